"""The Python lines of docs/planning.md as they stand there, and its command."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chain import ROOT, tool
from tests.inference.test_clips import image_file
from tests.planning.material import PLACES, WIDTH, drawn
from tests.videos import picture

STATE = [0.45, 0.02, 0.31, 3.14, 0.0, 0.0, 0.1]


@pytest.fixture
def reader(world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the document names."""
    shutil.copytree(world_folder, tmp_path / "DIR")
    for number, name in enumerate(("now", "goal")):
        image_file(tmp_path / f"{name}.png", picture(number), "png", "rgb24")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_lines_run(reader: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/planning.md").read_text(), re.DOTALL))
    assert len([line for line in code.splitlines() if line.strip()]) >= 15
    names: dict[str, Any] = {"state": torch.tensor([STATE]), "actions": drawn(1, 3, 7, scale=0.05)}
    exec(compile(code, "docs/planning.md", "exec"), names)
    assert names["imagined"].shape == (1, 3, PLACES, WIDTH)
    torch.testing.assert_close(names["next_tokens"], names["imagined"][:, 0], rtol=0, atol=1e-5)
    assert names["plan"].energies.shape == (1, 5, 100)
    assert names["first"].shape == (7,)
    assert names["better"].shape == (1,)
    assert abs(names["dx"]) <= 0.05 + 1e-6


def test_the_command(reader: Path) -> None:
    quick = ("--samples", "20", "--elites", "4", "--iterations", "2")

    given = ("DIR", "--now", "now.png", "--goal", "goal.png", "--state", *STATE, *quick)
    done = tool("plan", *given, "--horizon", "3", "--landscape", "energy.png", "--axes", "0", "2", cwd=reader)
    assert (reader / "energy.png").read_bytes().startswith(b"\x89PNG")
    *actions, energy, last = done.stdout.splitlines()
    assert last == "written: energy.png"
    assert [line.partition(":")[0] for line in actions] == ["action 1", "action 2", "action 3"]
    values = [[float(value) for value in line.partition(": ")[2].split()] for line in actions]
    assert all(len(row) == 7 and max(map(abs, row[:3])) <= 0.05 for row in values)
    assert re.fullmatch(r"energy: \d\.\d{4} now, \d\.\d{4} imagined after the plan", energy)
