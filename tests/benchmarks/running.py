"""Scripts of benchmarks/ as modules and as processes, and the tables that they print."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
# Networks as small as the masks of short clips allow.
SMALL = (
    "model.encoder={width: 48, depth: 2, heads: 2}",
    "model.predictor={width: 24, depth: 2, heads: 2}",
    "model.patch=8",
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")

Rows = list[dict[str, str]]
# A command that has run in this process: its exit code, standard output, standard error.
Run = Callable[..., tuple[int, str, str]]


def load(script: str) -> Any:
    """A script as a module that no other module is named like."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{script}", BENCHMARKS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_process(script: str, *words: object, **env: object) -> str:
    """Standard output of a script in a process of its own, for those that fork, spawn or measure their process."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in env.items()}},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(text: str) -> Rows:
    """The rows of a table, cells by column: of Markdown, or of columns between bars."""
    lines = [line.strip("|") for line in text.splitlines() if " | " in line]
    head, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert rows
    assert all(len(row) == len(head) for row in rows), text
    return [dict(zip(head, row, strict=True)) for row in rows]


def numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(cell)]


def column(rows: Rows, name: str, *, above: float = 0.0) -> list[float]:
    """The figures of a column, one a row: finite, and larger than ``above``."""
    found = []
    for row in rows:
        (value,) = numbers(row[name])
        assert math.isfinite(value), row
        assert value > above, (name, row)
        found.append(value)
    return found


# -- the step ----------------------------------------------------------------------------------------

PARTS = ("target", "context", "predictor", "backward", "optimiser", "EMA", "rest")
TINY = ("--model", "vit_tiny", "--frames", 4, "--size", 32, "--batch", 1)
STEPS = ("--steps", 3, "--warmup", 1, "--product", 256)


def of_step(text: str, *, clips: int) -> Rows:
    """The rows of step.py's table, after what holds for each."""
    rows = [row for row in table(text) if row["step"] != "---"]
    product = numbers(text.partition("a large matrix product:")[2])[0]
    for row in rows:
        (step,) = column([row], "step")
        # The parts are of one step, the typical one, which is the median of an odd number.
        assert sum(numbers(row[part])[0] for part in PARTS) == pytest.approx(step, abs=0.05 * (len(PARTS) + 1))
        assert column([row], "clips/s") == pytest.approx([1000 * clips / step], abs=0.01 + 60 * clips / step**2)
        column([row], "peak GiB")
        rate, share = numbers(row["TFLOP/s"])[0], column([row], "of a product", above=-1)[0] / 100
        assert rate / product == pytest.approx(share, abs=0.0006 + 0.0006 / product)
    return rows
