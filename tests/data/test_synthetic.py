import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.synthetic import (
    LABELS,
    MOTIONS,
    SHAPES,
    World,
    encode_mp4,
    render_clip,
    signed_distance,
    write_videos,
)

TOOL = Path(__file__).parents[2] / "tools" / "make_synthetic.py"
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
    command = [sys.executable, TOOL, "--clips", "16", "--val-clips", "4", "--size", "32", "--seconds", "1"]
    for out in ("a", "b"):
        subprocess.run([*command, tmp_path / out, "--workers", "2"], check=True, capture_output=True)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.mp4"))
    assert Counter(path.parts[0] for path in files) == {"train": 16, "val": 4}
    assert {path.parts[1] for path in files if path.parts[0] == "train"} == set(LABELS)
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    assert not list(tmp_path.glob(".*"))

    # the same again is nothing to do; another data set under the same name is refused
    subprocess.run([*command, tmp_path / "a"], check=True, capture_output=True)
    refused = subprocess.run([*command, tmp_path / "a", "--seed", "1"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'a'}")
    assert "Traceback" not in refused.stderr


def test_an_odd_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="even"):
        next(write_videos(tmp_path / "out", World(size=33), seed=0, train=1, val=0, workers=1))
