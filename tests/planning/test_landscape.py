"""Energies over two numbers of an action, and the picture of them."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tests.chain import tool
from tests.planning.worlds import Bowl, some_states
from vjepa_scale.core.errors import UserError
from vjepa_scale.planning.landscape import Landscape, draw_landscape, energy_landscape
from vjepa_scale.video.image_files import still_picture

BEST = torch.tensor([[0.0, 0.0, 0.0, 0, 0, 0, 0.0], [0.02, 0.01, -0.03, 0, 0, 0, 0.5]])


def test_the_least_energy_is_at_the_best_action() -> None:
    found = energy_landscape(Bowl(BEST), some_states(2)[1], axes=(0, 2), points=11, episode=1)
    assert found.energies.shape == (11, 11)
    assert found.lowest == pytest.approx((0.02, -0.03), abs=1e-6), "both are on the grid, every centimetre"
    assert found.values[0].tolist() == pytest.approx([k / 100 for k in range(-5, 6)], abs=1e-7)


def test_every_energy_is_that_of_its_action() -> None:
    """Other numbers of the first action, and later actions, stay as they were given; axes have limits of their own."""
    around = torch.tensor([[0.01, 0.02, 0.03, 0, 0, 0, 0.5], [0.04, 0, 0, 0, 0, 0, 0.0]])
    world, state = Bowl(BEST), some_states(1)[0]
    found = energy_landscape(world, state, axes=(6, 1), limits=(0.75, 0.05), points=5, around_H7=around, rows=7)
    assert world.calls == [7, 7, 7, 4]
    assert around[0, 6] == 0.5, "what was given is left as it was"
    for i, gripper in enumerate([-0.75, -0.375, 0, 0.375, 0.75]):
        for j, y in enumerate([-0.05, -0.025, 0, 0.025, 0.05]):
            energy = 0.01**2 + y**2 + 0.03**2 + gripper**2 + 0.04**2
            assert float(found.energies[i, j]) == pytest.approx(energy, rel=1e-5)


@pytest.fixture(scope="module")
def landscape() -> Landscape:
    return energy_landscape(Bowl(BEST), some_states(2)[1], axes=(0, 2), episode=1)


def test_a_png_is_a_picture(landscape: Landscape, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_landscape(tmp_path / "plain.png", landscape)
    draw_landscape(tmp_path / "marked.png", landscape, true_7=BEST[1], planned_7=BEST[1] * 0.5)
    plain, marked = (
        still_picture((tmp_path / f"{name}.png").read_bytes(), strict=True) for name in ("plain", "marked")
    )
    assert plain is not None
    assert marked is not None
    assert (plain.width, plain.height) == (marked.width, marked.height) == (780, 630)
    colours = [picture.reformat(format="rgb24").to_ndarray().reshape(-1, 3) for picture in (plain, marked)]
    red = [int(((c[:, 0] > 240) & (c[:, 1] < 90) & (c[:, 2] < 90)).sum()) for c in colours]
    assert red[0] == 0
    assert red[1] > 50, "the true action's star"


def test_an_svg_has_its_labels_and_is_the_same_every_time(landscape: Landscape, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        draw_landscape(tmp_path / name, landscape, true_7=BEST[1], planned_7=BEST[1], title="Where to?")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    root = ElementTree.parse(tmp_path / "one.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Δx (m)", "Δz (m)", "Where to?", "true action", "planned action", "least energy"} <= texts


def test_another_name_is_refused(landscape: Landscape, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.gif.*end the name in \.png or \.svg"):
        draw_landscape(tmp_path / "a.gif", landscape)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--landscape", "e.jpg"], r"e\.jpg.*end the name in \.png or \.svg"),
        (["--landscape", "nowhere/e.png"], "nowhere: no such folder"),
        (["--landscape", "e.png", "--axes", "2", "2"], "2 and 2 are one axis"),
    ],
)
def test_the_tool_refuses_a_picture_before_it_loads_anything(words: list[str], said: str, tmp_path: Path) -> None:
    """The model is not even there: that would be the error after it."""
    given = ["absent", "--now", "now.png", "--goal", "goal.png", "--state", *("0" * 7)]
    done = tool("plan", *given, *words, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr
