"""docs/decide.md: its commands and code run in order, on a smaller scale; its costs are those of the plans."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.chain import ROOT, tool
from tests.pages import blocks, file_on, run_line_here

PAGE = "docs/decide.md"
TEXT = (ROOT / PAGE).read_text()
COMMANDS = re.findall(r"^    (python .*)$", TEXT, re.MULTILINE)
ON_64 = [words for words in COMMANDS if "launch.nodes=8" in words]
# What makes them small: the page's word, and the test's.
SMALLER = {
    "--clips 100 --val-clips 40": "--clips 40 --val-clips 8 --size 40 --seconds 2",
    "recipes/mine.yaml --wait": "recipes/mine.yaml --wait pretrain.steps=3 cooldown.steps=2 engine.threads=1",
}


@pytest.mark.slow
@pytest.mark.distributed
def test_the_first_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "recipes/mine.yaml").write_text(file_on(PAGE, "recipes/mine.yaml"))
    day = [words for words in COMMANDS if words not in ON_64]
    small = day
    for words, fewer in SMALLER.items():
        assert sum(words in command for command in day) == 1
        small = [command.replace(words, fewer) for command in small]
    said = [run_line_here(command, cwd=tmp_path) for command in small]
    states = next(text for command, text in zip(small, said, strict=True) if "status" in command)
    assert states.count("done") == 2
    (code,) = blocks(PAGE, "python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, PAGE, "exec"), names)
    assert names["same"].shape == (8,)  # type: ignore[attr-defined]


def test_what_64_gpus_cost() -> None:
    """The table's steps, PFLOPs and hours are the plans'."""
    rows = re.findall(r"^\| `(\w+)`.*? \| (.*?) \| (.*?) \| ([\d,]+) \| ([\d.]+) days \|$", TEXT, re.MULTILINE)
    assert len(rows) == len(ON_64) == 2
    for command, (recipe, *stages, hours, days) in zip(ON_64, rows, strict=True):
        assert f"recipes/{recipe}.yaml" in command
        done = tool("launch", *shlex.split(command)[2:], check=False)
        assert "8 nodes × 8 = 64" in done.stdout
        computed = 0.0
        for stage, cell in zip(("pretrain", "cooldown"), stages, strict=True):
            found = re.fullmatch(r"([\d,]+) steps of ([\d.]+) PFLOPs", cell)
            assert found is not None
            steps, each = found[1].replace(",", ""), found[2]
            plan = done.stdout.partition(f"{stage}: {steps} steps")[2]
            last = "decay" if stage == "cooldown" else "constant"
            line = next(line for line in plan.splitlines() if line.startswith(f"  {last}:"))
            assert f", {each} PFLOPs a step" in line
            of_stage = re.split(r"^\w+: \d+ steps", plan, maxsplit=1, flags=re.MULTILINE)[0]
            computed += sum(int(found.replace(",", "")) for found in re.findall(r"([\d,]+) GPU-hours", of_stage))
        assert int(hours.replace(",", "")) == round(computed, -2)
        assert float(days) == round(computed / 64 / 24, 1)
