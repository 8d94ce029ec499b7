"""A tiny chain for tests: two data sets of real video, a recipe with everything in it, and the launcher."""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from tests.processes import LIMIT_S
from vjepa_scale.core.errors import exit_code

ROOT = Path(__file__).parents[1]

# A warmup, a constant phase on another grid and mixture, then a cooldown with longer and larger clips.
# Non-square pictures, two data sets, more micro-batches than ranks.
RECIPE: dict[str, Any] = {
    "run": {"seed": 5},
    "launch": {"cluster": "local", "tasks_per_node": 1, "timeout_min": 10},
    "engine": {"device": "cpu", "precision": "float32", "timeout_s": LIMIT_S},
    "data": {"seed": 3, "fps": 4, "lanes": 2, "workers": 1, "augment": {"flip": 0.5}},
    "model": {
        "encoder": {"width": 48, "depth": 2, "heads": 2},
        "predictor": {"width": 24, "depth": 2, "heads": 2},
        "patch": 8,
        "tubelet": 2,
    },
    "masks": {"group": 4, "generators": [{"blocks": 4, "spatial_scale": 0.15}, {"blocks": 1, "spatial_scale": 0.5}]},
    "jepa": {"ema_momentum": 0.9},
    "checkpoint": {"every": 4, "keep": 2},
    "log": {"every": 5, "effective_rank_every": 3},
    "pretrain": {
        "steps": 12,
        "clip": {"frames": 4, "size": [32, 40]},
        "global_batch": 8,
        "micro_batch": 2,
        "phases": [
            {"name": "warmup", "steps": 5, "start_lr": 1e-4, "final_lr": 1e-3},
            {"name": "constant", "clip": {"frames": 4, "size": [40, 32]}, "mixture": {"left": 1, "right": 3}},
        ],
    },
    "cooldown": {
        "continue_from": "pretrain",
        "steps": 6,
        "clip": {"frames": 8, "size": [40, 48]},
        "global_batch": 8,
        "micro_batch": 2,
        "phases": [{"name": "decay", "final_lr": 1e-6}],
    },
}


def tool(name: str, *arguments: object, check: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``main(argv)`` of tools/NAME.py here, from the repository's root, with what it and its children say.

    A start of Python with PyTorch costs 2.6 s of CPU: ``tool_process`` is for tests of what only a process shows
    (signals, exit codes, imports, the environment).
    """
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / stream for stream in ("stdout", "stderr")]
        with _written_to(*files), contextlib.chdir(cwd):
            code = exit_code(lambda: _command(name)(words))
        done = subprocess.CompletedProcess([name, *words], code, *(file.read_text(errors="replace") for file in files))
    return _checked(done, check)


def launch(
    recipe: Path | str, *words: object, check: bool = True, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """``tools/launch.py RECIPE WORDS --wait``, with ranks that are forked (tests/forked.py) and not started.

    The launcher that it writes down has ended when this returns, as a process of its own would have.
    """
    from tests.forked import ForkedExecutor, ended_process

    with (
        mock.patch("submitit.LocalExecutor", ForkedExecutor),
        mock.patch("vjepa_scale.launch.local.this_process", ended_process),
    ):
        return tool("launch", recipe, *words, "--wait", check=check, cwd=cwd)


def tool_process(
    name: str, *arguments: object, check: bool = True, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run tools/NAME.py in a process of its own as a user would, from the repository's root."""
    words = list(map(str, arguments))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return _checked(done, check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check:
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, f"{done.args} exited with {done.returncode}\n{said}"
    return done


@functools.cache
def _command(name: str) -> Callable[[Sequence[str]], int | None]:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def command(words: Sequence[str]) -> int | None:
        before, sys.argv = sys.argv, [str(spec.origin), *words]
        try:
            return module.main(words)  # type: ignore[no-any-return]
        except SystemExit as left:  # argparse's refusals
            return left.code if isinstance(left.code, int | None) else 1
        finally:
            sys.argv = before

    return command


@contextlib.contextmanager
def _written_to(stdout: Path, stderr: Path) -> Iterator[None]:
    """These files get what this process and its children write to standard output and to standard error."""
    with contextlib.ExitStack() as stack:
        for descriptor, (name, file) in enumerate((("stdout", stdout), ("stderr", stderr)), start=1):
            getattr(sys, name).flush()
            kept = os.dup(descriptor)
            stack.callback(os.close, kept)
            stream = stack.enter_context(open(file, "w", buffering=1))
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(stream.fileno(), descriptor)
            stack.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, stream)
        yield


def make_data(folder: Path) -> dict[str, Path]:
    """Two data sets of rendered MP4 files, sharded by the real tool."""
    sets = {}
    for seed, name in enumerate(("left", "right")):
        tool(
            "make_synthetic",
            folder / name,
            "--clips",
            24 + 8 * seed,
            "--val-clips",
            8,
            "--size",
            48,
            "--seed",
            seed,
            "--workers",
            2,
        )
        tool("make_shards", folder / name / "train", folder / f"{name}-shards", "--shard-records", 10)
        sets[name] = folder / f"{name}-shards"
    return sets


def write_recipe(path: Path, run_dir: Path, sets: dict[str, Path], **sections: Any) -> Path:
    """RECIPE for these data sets, with sections merged over it."""
    tree = json.loads(json.dumps(RECIPE))
    tree["run"]["dir"] = str(run_dir)
    tree["data"]["sets"] = {name: {"path": str(shards), "weight": 2} for name, shards in sets.items()}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if values is not None else None
    tree = {section: values for section, values in tree.items() if values is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


# The two stages behind the cooldown, on its frozen encoder.
ACTION: dict[str, Any] = {
    "init_from": "cooldown",
    "mixture": {"robot": 1},
    "steps": 8,
    "clip": {"frames": 4, "size": [32, 40]},
    "crop_aspect": 0.9,
    "global_batch": 8,
    "micro_batch": 2,
    "phases": [
        {"name": "warmup", "steps": 2, "start_lr": 1e-4, "final_lr": 1e-3},
        {"name": "constant", "clip": {"frames": 5, "size": [40, 32]}},
        {"name": "decay", "steps": 3, "final_lr": 0},
    ],
}
PROBE: dict[str, Any] = {
    "init_from": "cooldown",
    "mixture": {"left": 1},
    "evaluate_on": "held_out",
    "steps": 6,
    "clip": {"frames": 4, "size": [40, 32]},
    "global_batch": 8,
    "micro_batch": 2,
    "labels_per_class": 1,
    "depth": 2,
    "heads": 2,
    "lr_scales": [1, 0.3],
    "weight_decays": [0.01, 0.4],
    "phases": [{"name": "decay", "start_lr": 1e-3, "final_lr": 0}],
}


def make_four_stage_data(folder: Path, sets: dict[str, Path]) -> dict[str, Path]:
    """Beside two data sets: held-out labelled clips, and a robot's trajectories."""
    held_out, robot = folder / "held-out-shards", folder / "robot-shards"
    tool("make_shards", sets["left"].parent / "left" / "val", held_out)
    tool("make_synthetic", folder / "robot", "--robot", "--trajectories", 6, "--val-trajectories", 0, "--size", 48)
    tool("make_shards", folder / "robot" / "train", robot, "--trajectories", "droid", "--shard-records", 4)
    return {"held_out": held_out, "robot": robot}


def write_four_stages(path: Path, run_dir: Path, sets: dict[str, Path], more: dict[str, Path], **sections: Any) -> Path:
    """RECIPE with ACTION and PROBE behind it. more: what make_four_stage_data gave"""
    model = {**RECIPE["model"], "action_predictor": {"width": 48, "depth": 2, "heads": 2, "grid": 4}}
    both = {"model": model, "action": ACTION, "probe": PROBE}
    write_recipe(path, run_dir, sets, **{**both, **sections})
    tree = yaml.safe_load(path.read_text())
    tree["data"]["sets"] |= {name: {"path": str(shards), "weight": 0} for name, shards in more.items()}
    path.write_text(yaml.safe_dump(tree))
    return path


# Columns in which two equal runs differ.
OF_MACHINE = (
    "clips_per_s",
    "tokens_per_s",
    "flops_per_s",
    "mfu",
    "waiting",
    "saving",
    "decode/",
    "memory/",
    "restarts",
)


def metrics(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage, without the columns that depend on the machine."""
    rows = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(OF_MACHINE)} for row in rows]


def checkpoint_tensors(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, read by PyTorch's own converter (none of our code)."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = folder / f"{checkpoint.parent.parent.name}-{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, file)
    return _flat(torch.load(file, weights_only=True))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out
