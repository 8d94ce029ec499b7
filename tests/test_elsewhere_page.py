"""docs/elsewhere.md: torchrun's commands train, on one node and as two; the manifest starts the ranks it says."""

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import config_from_args, parse_args

from tests.chain import ROOT, metrics, write_recipe
from tests.pages import file_on
from tests.processes import LIMIT_S
from vjepa_scale.core.ranks import detect_ranks
from vjepa_scale.recipe import load_recipe, stages_of

PAGE = "docs/elsewhere.md"
LINES = re.findall(r"^    torchrun (.*)$", (ROOT / PAGE).read_text(), re.MULTILINE)
WORKER = "-m vjepa_scale.launch.worker recipes/vitl_256.yaml pretrain"


def asked(words: Sequence[str]) -> argparse.Namespace:
    """torchrun's own reading of its command line."""
    found: argparse.Namespace = parse_args(list(words))
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ended(*commands: list[str]) -> None:
    """Run these at the same time; all end with exit code 0."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SUBMITIT"))}
    env = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in commands
    ]
    try:
        for process in running:
            said, _ = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_on_one_machine_and_on_two(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    one, *two = LINES
    assert len(two) == 2
    assert all(line.endswith(WORKER) for line in LINES)
    steps = {"steps": 2, "phases": [{"name": "all", "start_lr": 1e-3}]}

    def smaller(line: str, name: str, **replaced: str) -> list[str]:
        recipe = write_recipe(
            tmp_path / f"{name}.yaml",
            tmp_path / name,
            two_data_sets,
            data={"workers": 0},
            pretrain=steps,
            cooldown=None,
        )
        words = shlex.split(line)
        for option, value in replaced.items():
            words[words.index(f"--{option.replace('_', '-')}") + 1] = value
        words[words.index("recipes/vitl_256.yaml")] = str(recipe)
        return words

    port = str(free_port())
    ended(["--standalone", *smaller(one, "one", nproc_per_node="2")])
    replaced = {"nproc_per_node": "1", "master_addr": "127.0.0.1", "master_port": port}
    ended(*(smaller(line, "two", **replaced) for line in two))
    for name in ("one", "two"):
        history = [json.loads(row) for row in (tmp_path / name / "pretrain/history.jsonl").read_text().splitlines()]
        assert [row["event"] for row in history if row["event"] in ("started", "done")] == ["started", "done"]
    assert len(metrics(tmp_path / "one", "pretrain")) == 2
    assert metrics(tmp_path / "one", "pretrain") == metrics(tmp_path / "two", "pretrain")


def test_the_nodes_differ_in_their_rank_alone() -> None:
    _, first, second = (vars(asked(shlex.split(line))) for line in LINES)
    assert (first.pop("node_rank"), second.pop("node_rank")) == (0, 1)
    assert first == second
    assert (first["nnodes"], first["nproc_per_node"]) == ("2", "8")


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all(file_on(PAGE, "vjepa.yaml"))
    assert (service["kind"], service["apiVersion"]) == ("Service", "v1")
    assert (job["kind"], job["apiVersion"]) == ("Job", "batch/v1")
    return service, job


def test_the_manifest_starts_every_rank_once() -> None:
    """As Kubernetes names the pods of an indexed Job, and torchrun the processes of a node."""
    service, job = manifest()
    name, spec, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    (worker,) = pod["containers"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # pods find each other before they are ready
        "selector": {"job-name": name},
    }
    assert worker["command"] == ["bash", "-c"]
    (script,) = worker["args"]
    ranks = []
    for node in range(spec["completions"]):
        environment = {entry["name"]: entry["value"] for entry in worker["env"]} | {"JOB_COMPLETION_INDEX": str(node)}
        echoed = subprocess.run(  # bash's own words, of which torchrun is not started
            ["bash", "-c", script.replace("exec torchrun", "printf '%s\\n'")],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        arguments = asked(echoed.stdout.splitlines())
        config, _, _ = config_from_args(arguments)
        assert config.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:{arguments.master_port}"
        assert (config.min_nodes, config.max_nodes) == (spec["completions"], spec["completions"])
        assert config.nproc_per_node == worker["resources"]["limits"]["nvidia.com/gpu"]
        assert config.rdzv_configs["rank"] == node
        world = config.max_nodes * config.nproc_per_node
        for local in range(config.nproc_per_node):
            of_torchrun = {
                "RANK": str(node * config.nproc_per_node + local),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(config.nproc_per_node),
                "MASTER_ADDR": arguments.master_addr,
                "MASTER_PORT": str(arguments.master_port),
            }
            ranks.append(detect_ranks(environment | of_torchrun))
        assert arguments.module
        assert arguments.training_script == "vjepa_scale.launch.worker"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert [(found.rank, found.world_size) for found in ranks] == [(rank, 16) for rank in range(16)]
    assert [found.local_rank for found in ranks] == [*range(8), *range(8)]
    assert len({found.job for found in ranks}) == 1

    recipe, stage, *overrides = arguments.training_script_args
    (phase, *_) = stages_of(load_recipe(ROOT / recipe, overrides))[stage].phases
    assert phase.global_batch // phase.micro_batch % world == 0


def test_the_manifest_mounts_what_it_names() -> None:
    _, job = manifest()
    pod = job["spec"]["template"]["spec"]
    (worker,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in worker["volumeMounts"]}
    assert sorted(mounts) == sorted(volume["name"] for volume in pod["volumes"])
    assert mounts["shm"] == "/dev/shm"
    (override,) = [word for word in worker["args"][0].split() if word.startswith("run.dir=")]
    assert override.startswith(f"run.dir={mounts['data']}/")
    assert worker["workingDir"].startswith(f"{mounts['data']}/")
