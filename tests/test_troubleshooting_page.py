"""docs/troubleshooting.md quotes messages as they are: each is produced here, or found in the source."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.chain import ROOT, tool, write_recipe
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks, detect_ranks
from vjepa_scale.data import host_limits
from vjepa_scale.data.substitution import DecodeFailure, Place
from vjepa_scale.data.watchdog import Stuck
from vjepa_scale.distributed import process_group
from vjepa_scale.launch import supervisor as supervisor_module
from vjepa_scale.launch.profile import load_profile
from vjepa_scale.launch.sbatch import need_sbatch
from vjepa_scale.launch.supervisor import Supervisor
from vjepa_scale.monitor.jobs import this_process
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.recipe.guard_sections import SpikesConfig
from vjepa_scale.recipe.schema import FaultsConfig
from vjepa_scale.run import failures, lock
from vjepa_scale.run.blame import blamed
from vjepa_scale.run.events import History
from vjepa_scale.run.ledger import Spike
from vjepa_scale.run.progress import shared_page
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.training.skipped_clips import SkippedClips
from vjepa_scale.training.spikes import SpikeLog
from vjepa_scale.training.step import NonFiniteLossError, StepGradients, apply_gradients

PAGE = ROOT / "docs" / "troubleshooting.md"
ROWS = re.findall(r"^\| `(.+?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
MESSAGES = [message for message, _ in ROWS]
# What PyTorch and pip say.
OTHERS = {"No matching distribution found for torch", "CUDA out of memory"}
# In the source alone: what would take a cluster, a finished run or a damaged one to produce.
IN_SOURCE = {
    "Python … is too old: 3.11 or newer is needed, as in make env PYTHON=python3.12": ".ci/check_python.py",
    "DeepSpeed is not installed (pip install 'vjepa_scale[deepspeed]', or kind: fsdp)": "training/preflight.py",
    "OUT holds another data set: …": "shards/work.py",
    "Slurm refused the job of '…': …": "launch/slurm.py",
    "every stage is already complete": "launch",
    "the recipe differs from the one that trained …: … (put it back, choose another run.dir, …)": "training",
    "another process is training this stage (wait for it, or end it: …)": "run/lock.py",
    "step … has taken … s, the median is … s": "training/slow_steps.py",
    "wrong results: rank … on …; since …": "training/device_watch.py",
    "the processes ended without an error message": "launch/retry_policy.py",
    "… twice in a row: it would come again": "launch/retry_policy.py",
    "Hugging Face's VJEPA2Model cannot express this model: … (use --to safetensors)": "checkpoint/formats",
    "its last checkpoint, …, is damaged (…)": "checkpoint/manifest.py",
}


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".+?".join(map(re.escape, message.split("…"))))


def of_spikes() -> Iterator[str]:
    """What ends a run that has too many."""
    skips = SpikeLog(Spike(step, "skip", "seen") for step in range(5))
    yield str(skips.refusal(SpikesConfig(), 5, rollback=False))
    rollbacks = SpikeLog(Spike(step, "rollback", "seen", 2) for step in range(3, 6))
    yield str(rollbacks.refusal(SpikesConfig(), 6, rollback=True))


def said_by(call: Callable[[], object]) -> str:
    with pytest.raises((UserError, NonFiniteLossError, RuntimeError)) as refused:
        call()
    return str(refused.value)


@pytest.fixture(scope="module")
def said(two_data_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What commands and functions say of each mistake, a line each."""
    folder = tmp_path_factory.mktemp("mistakes")
    return "\n".join([*of_commands(folder, two_data_sets), *of_functions(folder, two_data_sets), *of_spikes()])


def of_commands(folder: Path, sets: dict[str, Path]) -> Iterator[str]:
    recipe = write_recipe(folder / "recipe.yaml", folder / "run", sets)
    (folder / "no shards").mkdir()
    cut = folder / "cut"
    shutil.copytree(sets["left"], cut)
    shard = next(cut.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    profile = folder / "site.yaml"
    profile.write_text("gpus_per_node: 1")
    for words in (
        ["none.yaml"],
        [recipe, "optimiser.eps=1"],
        [recipe, f"data.sets.left.path={folder / 'nowhere'}"],
        [recipe, f"data.sets.left.path={folder / 'no shards'}"],
        [recipe, f"data.sets.left.path={cut}"],
        [recipe, "pretrain.micro_batch=3"],
        [recipe, "launch.tasks_per_node=3"],
        [recipe, "launch.tasks_per_node=4", "engine.replicate=3"],
        [recipe, "--stages", "cooldown"],
        [recipe, "launch.nodes=2"],
        [recipe, "engine.device=cuda", f"launch.profile={profile}", "--cluster=slurm", "launch.tasks_per_node=2"],
        [recipe, "launch.profile=example_h100", "--cluster=slurm"],
    ):
        done = tool("launch", *words, "--dry-run", check=False)
        yield done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        for gpus in (0, 1):
            patch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
            yield tool("launch", recipe, "engine.device=cuda", "launch.tasks_per_node=2", "--dry-run").stdout
    with lock.only_launcher_of(folder / "run"):
        done = tool("launch", recipe, "--wait", check=False)
        assert done.returncode == 2
        yield done.stderr
    history = History(folder / "run" / "pretrain")
    history.add("submitted", cluster="local", job_id="1", launch="launches/0001", **this_process())
    done = tool("launch", recipe, "--wait", check=False)
    assert done.returncode == 2
    yield done.stderr
    done = tool("consolidate", folder / "no shards", "--out", folder / "out", check=False)
    assert done.returncode == 2
    yield done.stderr


def of_lost_ranks(failures: Path) -> Iterator[str]:
    ranks = Ranks(1, 2, 1, 2, "7", "submitit-local", "7")
    supervisor = Supervisor(2**22 + 1, shared_page(), ranks=ranks, failures=failures, logs=failures)
    supervisor.tell(signal.SIGKILL, None)
    yield json.loads((failures / "7.1.supervisor.json").read_text())["message"]
    places = [{"rank": rank, "node": "c1", "pid": 50 + rank, "gpu": None} for rank in range(2)]
    words = {"step": 12, "kind": "RuntimeError", "message": "Connection closed by peer"}
    for how in ({"answered": False}, {"answered": True}, {"answered": True, "waits": True}):
        account = {"part": "forward", "waited_s": 480.0, "overdue": True, "waits": False, "state": "stopped", **how}
        rows = [
            {"rank": rank, **words, "bystander": account["waits"], "account": {**account, "place": places[rank]}}
            for rank in range(2)
        ]
        yield blamed(rows[0], rows, places)["message"]
    alone = {"rank": 0, **words, "bystander": True}
    yield blamed(alone, [alone], places)["message"]
    places = [{"rank": rank, "node": f"c{rank // 2}", "pid": 50 + rank, "gpu": None} for rank in range(6)]
    yield blamed(alone, [alone], places)["message"]
    yield blamed(alone, [{**alone, "rank": rank} for rank in range(4)], places)["message"]
    yield str(Stuck(0, 123, "sleeping", Place(12, 3, "k710", 17), 255.0))
    yield from of_supervisors_that_cannot(failures / "7.1.supervisor.json", ranks)


def of_supervisors_that_cannot(file: Path, ranks: Ranks) -> list[str]:
    """End their rank, or write below a file."""
    said: list[str] = []
    child = subprocess.Popen(["sleep", "600"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor_module, "say", lambda text, **_: said.append(text))
        patch.setattr(Supervisor, "cannot_be_ended", True)
        supervisor = Supervisor(child.pid, shared_page(), ranks=ranks, failures=file / "failures", logs=file)
        supervisor.wait()
        supervisor.tell(signal.SIGBUS, None)
    child.kill()
    child.wait()
    return said


def of_functions(folder: Path, sets: dict[str, Path]) -> Iterator[str]:
    def made(videos: Path, out: Path) -> str:
        return said_by(lambda: make_shards(videos, out, Settings(), workers=1, progress=lambda *_: None))

    texts, full = folder / "texts", folder / "full"
    for place in (texts, full):
        place.mkdir()
        (place / "notes.txt").write_text("not a video")
    yield from of_lost_ranks(folder / "lost" / "failures")
    yield made(folder / "nowhere", folder / "shards")
    yield made(texts, folder / "shards")
    yield made(texts, full)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder))
        yield said_by(lambda: need_sbatch(where="launch.cluster", otherwise="--cluster local"))
        stage = stages_of(load_recipe(folder / "recipe.yaml"))["pretrain"]
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=1024))
        patch.setattr(host_limits, "SHM", folder)
        # Its message names the folder.
        yield said_by(lambda: host_limits.check_limits(stage, ranks_on_node=2)).replace(str(folder), "/dev/shm")
    yield said_by(lambda: load_profile("nowhere"))
    yield said_by(lambda: detect_ranks({"RANK": "0"}))
    yield str(failures.reported_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")))

    broken = [DecodeFailure(0, slot, "left", slot, "a", "0.tar", "unreadable") for slot in range(2)]
    skipped = SkippedClips(folder, "pretrain")
    faults = FaultsConfig(max_rate=0)
    yield said_by(lambda: skipped.enter(broken, step=0, global_batch=8, faults=faults, write=False))

    nan = StepGradients(
        float("nan"), {"all": 1.0}, {}, {}, [], stop=False, collapsed=False, failures=False, observe=None
    )
    engine: Any = SimpleNamespace(discard_gradients=lambda: None)
    objective: Any = None
    yield said_by(lambda: apply_gradients(objective, engine, nan, lr=1.0))
    store: Any = SimpleNamespace(check=lambda _: False)
    ranks = Ranks(0, 2, 0, 2, "job", "single", "job")
    yield said_by(lambda: process_group._wait_for_everyone(store, ranks, 0.0))


def test_the_page_has_its_rows() -> None:
    assert len(ROWS) == len(set(MESSAGES)) >= 20
    assert len(ROWS) == PAGE.read_text().count("\n| `")
    assert set(MESSAGES) >= {*OTHERS, *IN_SOURCE}


@pytest.mark.parametrize("message", [m for m in MESSAGES if m not in {*OTHERS, *IN_SOURCE, "DistBackendError"}])
def test_a_message_is_said_so(message: str, said: str) -> None:
    assert pattern(message).search(said), said


@pytest.mark.parametrize(("message", "place"), IN_SOURCE.items())
def test_a_message_is_in_the_source(message: str, place: str) -> None:
    """Its words, without what differs, and without quotes and brackets, which the source writes in other ways."""
    named = [ROOT / place, ROOT / "vjepa_scale" / place]
    files = [file for path in named if path.exists() for file in (path.rglob("*.py") if path.is_dir() else [path])]
    files += [file for folder in ("tools", "vjepa_scale/commands") for file in (ROOT / folder).glob("launch.py")]
    source = "\n".join(file.read_text() for file in files)
    for part in re.split(r"[…():{}]+|'", message):
        words = part.strip(" ,;")
        assert words in source or not words, words


def test_what_pytorch_says() -> None:
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    error = torch.distributed.DistBackendError("NCCL")
    assert failures._is_bystander(error)


def test_the_advice_names_keys_that_exist() -> None:
    keys = (ROOT / "docs" / "recipe_keys.md").read_text()
    named = {
        key for _, advice in ROWS for key in re.findall(r"`((?:launch|engine|data|masks|checkpoint)\.[\w.]+)", advice)
    }
    assert len(named) > 8
    for key in named:
        assert f"`{key}`" in keys, key
