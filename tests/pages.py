"""What stands on the pages of docs/, for tests that run it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.chain import ROOT, launch, tool
from tests.processes import LIMIT_S

# A recipe for one GPU, pretrain and cooldown, on a CPU: two steps a stage.
TOY = (
    "launch.cluster=local",
    "engine={device: cpu, precision: float32, compile: false}",
    "data.workers=1",
    "model.encoder={width: 48, depth: 2, heads: 2}",
    "model.predictor={width: 24, depth: 1, heads: 2}",
    "masks.group=2",
    "log.every=1",
    *(
        f"{stage}.{option}"
        for stage in ("pretrain", "cooldown")
        for option in ("clip={frames: 4, size: 64}", "steps=2", "global_batch=4", "micro_batch=2")
    ),
    "pretrain.phases=[{name: warmup, steps: 0.5, start_lr: 1e-4, final_lr: 5e-4}, {name: constant}]",
)


def run_line(line: str, *more: str, cwd: Path) -> str:
    """Runs a page's ``python …`` line, its comment left out, with more words behind it; what it prints."""
    done = subprocess.run(
        [sys.executable, *shlex.split(line, comments=True)[1:], *more],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_line_here(line: str, *, cwd: Path) -> str:
    """As ``run_line``, but in this process, and ranks are forked: a start of Python with PyTorch costs 2.3 s of CPU."""
    words = shlex.split(line, comments=True)[1:]
    name, words = Path(words[0]).stem, words[1:]
    if "--wait" not in words:
        return tool(name, *words, cwd=cwd).stdout
    assert name == "launch", line
    return launch(*(word for word in words if word != "--wait"), cwd=cwd).stdout


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, by the language behind their three backticks ("" where there is none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [text for named, text in found if named == language]


def file_on(page: str, name: str) -> str:
    """The content that a page gives for a file: the block below a line that ends with its name and a colon."""
    text = (ROOT / page).read_text()
    found = re.findall(rf"`{re.escape(name)}`:\n\n```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{page} gives {name} {len(found)} times"
    return str(found[0])


def registry_line(page: str, mapping: str, kind: str) -> str:
    """The line that a page adds to a mapping of recipe/registry.py for a kind."""
    text = (ROOT / page).read_text()
    (line,) = re.findall(rf'^(    "{kind}": "vjepa_scale\.[\w.:]+",) +# {mapping}$', text, re.MULTILINE)
    return f"{line}\n"
