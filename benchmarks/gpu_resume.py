"""Rows of benchmarks/gpu.py that run the launcher: a killed run compared with an undisturbed one, and two processes."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import torch
from gpu_book import Row, Unit
from gpu_rows import ROOT, Session, in_a_group
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from vjepa_scale.core.errors import EXIT_USER_ERROR
from vjepa_scale.core.files import read_jsonl, write_atomic
from vjepa_scale.recipe import recipe_yaml


def measure_resume(session: Session, unit: Unit) -> list[Row]:
    """Measures two concurrent runs, one of which loses its rank; both must end with the same bits."""
    whole, killed = (_recipe_file(session, unit, name) for name in ("whole", "killed"))
    with _launched(whole) as launcher, _launched(killed) as victim:
        at = _kill_rank(victim, killed.parent, every=session.sizes.trained_steps // 6)
        for name, process in (("undisturbed", launcher), ("killed", victim)):
            said, _ = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"the {name} run ended with {process.returncode}: {said[-200:]}")
    starts = [row for row in read_jsonl(killed.parent / "pretrain" / "history.jsonl") if row["event"] == "started"]
    if [row["kind"] for row in starts] != ["fresh", "resume"]:
        raise RuntimeError(f"the killed run was not resumed once: {[row['kind'] for row in starts]}")
    rows, losses = (_metrics(recipe.parent) for recipe in (whole, killed))
    problem = difference(rows, losses) or _tensor_difference(whole.parent, killed.parent, session.folder)
    facts = {
        "equal": not problem,
        "steps": len(rows),
        "killed after step": at,
        "resumed from step": starts[1]["step"],
    }
    row: Row = {"name": unit.names[0], "facts": facts}
    return [{**row, "state": "failed", "reason": problem} if problem else row]


def measure_two(session: Session, unit: Unit) -> list[Row]:
    """Measures two processes on one machine: on one GPU the product refuses the second."""
    recipe = _recipe_file(session, unit, "two", tasks=2, steps=4)
    with _launched(recipe) as launcher:
        said, _ = launcher.communicate()
    row: Row = {"name": unit.names[0]}
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if (
        errors
        and launcher.returncode == EXIT_USER_ERROR
        and session.device.type == "cuda"
        and torch.cuda.device_count() < 2
    ):
        return [{**row, "state": "refused", "reason": errors[-1].removeprefix("error: ")}]
    if launcher.returncode != 0:
        raise RuntimeError(f"the launcher ended with {launcher.returncode}: {' '.join(errors) or said[-200:]}")
    return [{**row, "facts": {"steps": len(_metrics(recipe.parent))}}]


def _recipe_file(session: Session, unit: Unit, name: str, *, tasks: int = 1, steps: int | None = None) -> Path:
    """Writes the recipe of a run that tools/launch.py starts here; returns its path."""
    assert unit.shape is not None
    steps = steps or session.sizes.trained_steps
    run = session.folder / f"run-{name}-{unit.switches['compile']}"
    shards = session.shards(unit.shape.frames, unit.shape.size)
    overrides = [
        *session.sizes.trained,
        f"run.dir='{run}'",
        f"launch={{cluster: local, tasks_per_node: {tasks}, timeout_min: 10}}",
        "engine.deterministic=true",
        f"data.sets={{videos: {{path: '{shards}'}}}}",
        "data.lanes=2",
        "data.workers=1",
        f"checkpoint={{every: {max(1, steps // 6)}, keep: 2}}",
        f"pretrain.micro_batch={unit.shape.batch // 2}",
        "pretrain.phases=[{name: all, start_lr: 1e-4}]",
        f"masks.group={unit.shape.batch // 2}",
    ]
    recipe = session.recipe(unit, steps=steps, overrides=overrides)
    write_atomic(run / "given.yaml", recipe_yaml(recipe))
    return run / "given.yaml"


def _launched(recipe: Path) -> "contextlib.AbstractContextManager[Popen[str]]":
    return in_a_group([sys.executable, ROOT / "tools" / "launch.py", recipe, "--wait"])


def _kill_rank(launcher: "Popen[str]", run: Path, *, every: int) -> int:
    """Sends SIGKILL to the run's only rank, two steps after a checkpoint; returns the number of its completed steps."""
    while True:
        if launcher.poll() is not None:
            raise RuntimeError(f"ended before it was killed: {launcher.communicate()[0][-200:]}")
        saved = [int(path.name.removeprefix("step_")) for path in (run / "pretrain" / "checkpoints").glob("step_*")]
        done = len(list(read_jsonl(run / "pretrain" / "metrics.jsonl")))
        if saved and done >= max(saved) + 2 and done < 5 * every and (rank := _rank_below(launcher.pid)):
            rank.kill()
            return done
        time.sleep(0.005)


def _rank_below(pid: int) -> psutil.Process | None:
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # the process ended meanwhile
            is_rank = process.environ().get("SUBMITIT_LOCAL_GLOBALID") == "0"
            if is_rank and "submitit" in " ".join(process.cmdline()):
                return process
    return None


def _metrics(run: Path) -> list[Row]:
    return list(read_jsonl(run / "pretrain" / "metrics.jsonl"))


def difference(whole: Sequence[Row], killed: Sequence[Row]) -> str:
    """Describes where losses and gradient norms of two runs differ, in a bit or in a step; empty if they are equal."""
    if [row["step"] for row in whole] != [row["step"] for row in killed]:
        return f"{len(whole)} steps in the undisturbed run, {len(killed)} in the killed one"
    for a, b in zip(whole, killed, strict=True):
        for name in ("loss", "grad_norm"):
            if a[name] != b[name]:
                return f"step {a['step']}: {name} {a[name]!r} undisturbed, {b[name]!r} after kill -9"
    return ""


def _tensor_difference(whole: Path, killed: Path, folder: Path) -> str:
    """Describes which tensors of the last checkpoints differ in a bit; empty where none does."""
    (a, b) = (_last_tensors(run, folder) for run in (whole, killed))
    if a.keys() != b.keys():
        return "the last checkpoints hold other tensors"
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    return f"{len(differ)} of {len(a)} tensors of the last checkpoints differ, first {differ[0]}" if differ else ""


def _last_tensors(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors with PyTorch's own converter, not with the code under test."""
    newest = max((run / "pretrain" / "checkpoints").glob("step_*"))
    file = folder / "tensors.pt"
    dcp_to_torch_save(newest, file)
    flat: dict[str, torch.Tensor] = {}

    def flatten(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                flatten(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    flatten(torch.load(file, weights_only=True), "")
    return flat
