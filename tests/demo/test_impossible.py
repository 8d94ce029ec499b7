import numpy as np
import pytest

from vjepa_scale.core.errors import UserError
from vjepa_scale.demo.surprise import EVENTS, CrossedVideos, render_impossible
from vjepa_scale.demo.synthetic import LABELS, MOTIONS, World, render_clip

SMALL = World(size=32, fps=8, seconds=3.0)
BRIGHT = 127  # between the background, at most 0.32 of 255, and the sheet, at least 0.68


def drawn(event: str, count: int = 8) -> list[CrossedVideos]:
    return [render_impossible(SMALL, 3, index, (event,)) for index in range(count)]


def bright(frames: np.ndarray) -> np.ndarray:
    return frames.mean(-1) > BRIGHT


@pytest.mark.parametrize("event", EVENTS)
def test_videos_are_equal_before_the_event_and_differ_after(event: str) -> None:
    for crossed in drawn(event):
        assert crossed.possible.shape == crossed.impossible.shape == (2, 24, 32, 32, 3)
        assert (crossed.possible.dtype, crossed.impossible.dtype, crossed.event) == (np.uint8, np.uint8, event)
        first = crossed.first
        assert 8 <= first < 16
        assert (crossed.possible[:, :first] == crossed.impossible[:, :first]).all()
        differ = (crossed.possible != crossed.impossible).any(-1).mean((2, 3))
        assert (differ[:, first] > 0.05).all()
        assert np.median(differ[:, first:]) > 0.1
        # Every picture of the one kind is one of the other's, at the same time.
        assert (crossed.impossible[:, first:] == crossed.possible[::-1, first:]).all()


def test_videos_are_a_function_of_the_arguments_and_of_scenes_of_their_own() -> None:
    crossed, again = (render_impossible(SMALL, 3, 5) for _ in range(2))
    assert (crossed.possible == again.possible).all()
    assert (crossed.impossible == again.impossible).all()
    for other in (render_impossible(SMALL, 4, 5).possible[0], render_clip(SMALL, 3, "val", 5)[0]):
        assert (other != crossed.possible[0]).mean() > 0.5


def test_noise_is_part_of_the_pictures_and_tells_nothing_of_the_event() -> None:
    world = World(size=32, fps=8, seconds=3.0, noise=0.3)
    crossed, clean = render_impossible(world, 3, 5), render_impossible(SMALL, 3, 5)
    first = crossed.first
    assert (crossed.possible[:, :first] == crossed.impossible[:, :first]).all()
    assert (crossed.possible[:, first:] == crossed.impossible[::-1, first:]).all()
    added = (crossed.possible.astype(float) - clean.possible)[..., 0].reshape(2 * 24, -1)
    assert added.std(1).min() > 0.15 * 255
    together = np.corrcoef(added)
    assert np.abs(together - np.eye(len(together))).max() < 0.35  # each frame has noise of its own


def test_events_and_labels_take_turns() -> None:
    several = [render_impossible(World(size=8, seconds=2), 0, index) for index in range(len(EVENTS) * len(LABELS))]
    assert {(one.event, one.label) for one in several} == {(event, label) for event in EVENTS for label in LABELS}
    assert len({one.first for one in several}) > 3


def velocity(frames: np.ndarray) -> np.ndarray:
    """(x, y) in pixels per frame: the least squares of dI/dx·vx + dI/dy·vy = −dI/dt over all pixels (Lucas-Kanade)."""
    grey = frames.astype(float).mean(-1)
    now = (grey[1:] + grey[:-1]) / 2
    slopes = np.stack([np.gradient(now, axis=2).ravel(), np.gradient(now, axis=1).ravel()], 1)
    return np.linalg.lstsq(slopes, -np.diff(grey, axis=0).ravel(), rcond=None)[0]


@pytest.mark.parametrize("event", EVENTS)
def test_ways_before_and_after(event: str) -> None:
    """A possible video keeps its way; an impossible one goes back, turns, or goes on."""
    fine = World(size=64, fps=32, seconds=1.0)
    for index in range(4):
        crossed = render_impossible(fine, 3, index, (event,))
        way = np.array(MOTIONS[crossed.label.split("-")[1]])
        across = np.array([-way[1], way[0]])

        def share(frames: np.ndarray, way: np.ndarray = way, across: np.ndarray = across) -> tuple[float, float]:
            """Of the speed, along the way and across it."""
            moved = velocity(frames)
            return float(moved @ way / np.linalg.norm(moved)), float(moved @ across / np.linalg.norm(moved))

        for frames in (
            crossed.possible[0, : crossed.first],
            crossed.possible[0, crossed.first :],
            crossed.impossible[0, : crossed.first],
        ):
            assert share(frames)[0] > 0.95
        along, aside = share(crossed.impossible[0, crossed.first :])
        if event == "turn":
            assert abs(aside) > 0.95
        else:
            assert (-along if event == "reverse" else along) > 0.95


def test_reversed_motion_is_the_past_backwards() -> None:
    for crossed in drawn("reverse"):
        last = crossed.first - 1
        for after in range(1, min(last + 1, 24 - last)):
            apart = crossed.impossible[0, last + after].astype(int) - crossed.impossible[0, last - after]
            assert np.abs(apart).max() <= 1  # the last bit of a float32


def test_a_jump_moves_the_sheet_and_not_the_background() -> None:
    for index in range(4):
        jump, vanish = (render_impossible(SMALL, 3, index, (event,)) for event in ("jump", "vanish"))
        assert (jump.possible[0] == vanish.possible[0]).all()
        background = vanish.possible[1].astype(int)
        bare = [(np.abs(frames - background).max(-1) <= 1).mean() for frames in jump.possible]
        assert bare[0] > 0.25
        assert bare[0] == pytest.approx(bare[1], rel=0.2)
        # The sheet covers as much as before, but elsewhere.
        covered = [bright(frames) for frames in jump.possible]
        assert covered[0].mean() == pytest.approx(covered[1].mean(), rel=0.3)
        assert (covered[0] & covered[1]).mean() < 0.7 * covered[0].mean()


def test_another_shape_covers_as_much() -> None:
    shares = []
    for crossed in drawn("shape", 16):
        covered = [bright(frames) for frames in crossed.possible]
        shares.append(covered[1].mean() / covered[0].mean())
        assert (covered[0] & covered[1]).any()
    assert np.mean(shares) == pytest.approx(1, abs=0.1)  # shapes have equal areas


def test_what_is_gone_is_gone_and_comes_out_of_nothing() -> None:
    for crossed in drawn("vanish"):
        seen = bright(crossed.impossible).any((2, 3))
        before = np.arange(24) < crossed.first
        assert (seen == np.stack([before, ~before])).all()


def test_what_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(UserError, match="explode"):
        render_impossible(SMALL, 0, 0, ("explode",))
    with pytest.raises(UserError, match="5 frames"):
        render_impossible(World(fps=5, seconds=1), 0, 0)
