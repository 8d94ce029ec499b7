import io
import json
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from tests.chain import tool
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.demo.synthetic import (
    LABELS,
    MOTIONS,
    SHAPES,
    World,
    encode_mp4,
    noisy,
    render_clip,
    signed_distance,
    world_of,
    write_videos,
)

SMALL = World(size=32, fps=4, seconds=2.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_equal_areas_and_their_edge_at_zero(shape):
    side = (np.arange(1000, dtype=np.float32) + 0.5) / 1000 * 6 - 3
    y, x = np.meshgrid(side, side, indexing="ij")
    distance = signed_distance(shape, x, y)
    assert (distance < 0).mean() * 36 == pytest.approx(np.pi, rel=0.01)
    slope = np.hypot(*np.gradient(distance, side[1] - side[0]))
    assert np.median(slope[np.abs(distance) < 0.05]) == pytest.approx(1, abs=0.02)


def test_a_clip_is_a_function_of_seed_split_and_index():
    frames, label = render_clip(SMALL, 7, "train", 3)
    again, _ = render_clip(SMALL, 7, "train", 3)
    assert (frames.shape, frames.dtype) == ((8, 32, 32, 3), np.uint8)
    assert label == LABELS[3]
    assert (frames == again).all()
    for other in [(8, "train", 3), (7, "val", 3), (7, "train", 3 + len(LABELS))]:
        assert (render_clip(SMALL, *other)[0] != frames).mean() > 0.5


def test_everything_moves_and_moves_smoothly():
    """Neighbouring frames differ, and by less than later ones: motion that can be predicted."""
    for index in range(len(LABELS)):
        frames = render_clip(World(size=32), 0, "train", index)[0].astype(float)
        by_gap = [np.abs(frames[gap:] - frames[:-gap]).mean() for gap in range(1, 8)]
        assert 2 < by_gap[0] < 0.75 * max(by_gap)


@pytest.fixture(scope="module")
def clips():
    rendered = [render_clip(SMALL, 0, "train", i) for i in range(640)]
    return np.stack([frames for frames, _ in rendered]), [label for _, label in rendered]


@pytest.mark.parametrize("part", ["shape", "motion"])
def test_pixels_and_colours_do_not_tell_the_label(clips, part):
    """Few labels on one frame's pixels, and on the clip's colour statistics, leave both parts near chance."""
    frames, labels = clips
    names = SHAPES if part == "shape" else tuple(MOTIONS)
    y = np.array([names.index(label.split("-")[part == "motion"]) for label in labels])
    pixels = frames[:, 4, ::2, ::2].reshape(len(frames), -1) / 255
    colours = np.concatenate([frames[:, 4].mean((1, 2)), frames[:, 4].std((1, 2))], 1) / 255
    accuracies = {}
    for name, x in (("pixels", pixels), ("colours", colours)):
        for model in (LogisticRegression(C=0.1, max_iter=500), KNeighborsClassifier(5)):
            score = model.fit(x[:320], y[:320]).score(x[320:], y[320:])
            accuracies[name, type(model).__name__] = score
    # four classes, 320 held-out clips: chance is 0.25, one standard error 0.024
    assert max(accuracies.values()) < 0.36, accuracies


def test_one_frame_has_the_same_distribution_under_every_motion(clips):
    """Mean and spread of single-frame brightness per motion agree within sampling error."""
    frames, labels = clips
    brightness = frames[:, -1].mean((1, 2, 3))
    groups = [brightness[[label.endswith(motion) for label in labels]] for motion in MOTIONS]
    error = brightness.std() / np.sqrt(len(groups[0]))
    assert max(abs(group.mean() - brightness.mean()) for group in groups) < 3 * error


def test_noise_is_white_and_as_strong_as_it_says():
    """By numpy's own statistics, on a grey that no noise leaves the range of."""
    grey = np.full((40, 32, 32, 3), 128, np.uint8)
    frames = noisy(grey, 0.1, KeyedRng(0, "test"))
    added = frames.astype(float) - 128
    assert (added == added[..., :1]).all()  # grey: film grain, not colour
    added = added[..., 0]
    assert added.std() == pytest.approx(25.5, rel=0.02)
    assert abs(added.mean()) < 0.5
    for axis in range(3):  # neither in time nor along a row or column does a pixel tell of the next
        ahead, behind = (
            np.take(added, range(*ends), axis) for ends in ((1, added.shape[axis]), (0, added.shape[axis] - 1))
        )
        assert abs(np.corrcoef(ahead.ravel(), behind.ravel())[0, 1]) < 0.02


def test_a_noisy_clip_shows_the_scene_of_the_clean_one():
    clean, label = render_clip(SMALL, 7, "train", 3)
    noisy_clip, same = render_clip(replace(SMALL, noise=0.45), 7, "train", 3)
    assert same == label
    assert 0.25 < (noisy_clip.astype(float) - clean).std() / 255 < 0.45  # what leaves the range is cut off
    again, _ = render_clip(replace(SMALL, noise=0.45), 7, "train", 3)
    assert (noisy_clip == again).all()
    other, _ = render_clip(replace(SMALL, noise=0.45), 7, "train", 3 + len(LABELS))
    assert np.corrcoef((noisy_clip.astype(float) - clean).ravel(), other.ravel())[0, 1] < 0.05


def test_the_noise_outlives_h264():
    """A codec that smoothed it away would make another world of it."""
    clean, _ = render_clip(World(size=48, fps=4), 7, "train", 3)
    frames, _ = render_clip(World(size=48, fps=4, noise=0.45), 7, "train", 3)
    with av.open(io.BytesIO(encode_mp4(frames, 4))) as container:
        decoded = np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)])
    before, after = ((shown.astype(float) - clean).std() for shown in (frames, decoded))
    assert after == pytest.approx(before, rel=0.05)


def test_files_are_h264_that_others_read_back(tmp_path):
    frames, _ = render_clip(World(size=48), 0, "val", 5)
    (tmp_path / "x.mp4").write_bytes(encode_mp4(frames, 8))
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
        decoded = np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(stream)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean() < 8


def test_tool_writes_whole_balanced_and_repeatable_data_sets(tmp_path):
    settings = ("--clips", 16, "--val-clips", 4, "--size", 32, "--seconds", 1)
    for out, workers in (("a", 1), ("b", 2)):
        said = tool("make_synthetic", tmp_path / out, *settings, "--workers", workers)
        assert said.stdout.splitlines()[-1] == f"{tmp_path / out}: 16 clips for training, 4 held out"
        assert "\r" not in said.stderr  # a bar is for a terminal
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.mp4"))
    assert Counter(path.parts[0] for path in files) == {"train": 16, "val": 4}
    assert {path.parts[1] for path in files if path.parts[0] == "train"} == set(LABELS)
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    assert not list(tmp_path.glob(".*"))

    # the same again is nothing to do; another data set under the same name is refused
    tool("make_synthetic", tmp_path / "a", *settings)
    refused = tool("make_synthetic", tmp_path / "a", *settings, "--seed", 1, check=False)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'a'}")
    assert "Traceback" not in refused.stderr
    # what an earlier version wrote, which knew no noise, is the same data set
    assert "noise" not in json.loads((tmp_path / "a" / "world.json").read_text())["world"]


def test_tool_renders_other_looks_and_refuses_what_they_cannot_be(tmp_path):
    settings = ("--clips", 2, "--val-clips", 1, "--size", 32, "--seconds", 1, "--workers", 1)
    tool("make_synthetic", tmp_path / "a", *settings, "--tint", "0.05", "--noise", "0.45")
    world = World(size=32, seconds=1, tint=0.05, noise=0.45)
    assert world_of(tmp_path / "a") == world
    with av.open(str(tmp_path / "a" / "train" / LABELS[1] / "00001.mp4")) as container:
        decoded = np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)])
    assert np.abs(decoded.astype(float) - render_clip(world, 0, "train", 1)[0]).mean() < 8
    for wrong in (["--noise", "1.5"], ["--robot", "--noise", "0.1"]):
        refused = tool("make_synthetic", tmp_path / "b", *settings, *wrong, check=False)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith("error: --noise")


def test_an_odd_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="even"):
        next(write_videos(tmp_path / "out", World(size=33), seed=0, train=1, val=0, workers=1))
