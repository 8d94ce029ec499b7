"""surprise() against Hugging Face's VJEPA2Model and numpy; what it looks at; windows and seconds; its command."""

import csv
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import VJEPA2Model

import vjepa_scale
from tests.chain import ROOT
from tests.inference.checkpoint import FPS, FRAMES, GRID, SIZE
from tests.inference.judge import close, sampled, tokens_of
from tests.inference.test_model import SPACE, prediction_by_hand
from tests.videos import encoded, picture
from vjepa_scale.checkpoint.formats.source import future_mask_token
from vjepa_scale.core.errors import UserError
from vjepa_scale.inference.model import Model
from vjepa_scale.inference.surprise import sliding

STEPS = GRID[0]


def random_clip(frames: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, frames, SIZE, SIZE, generator=torch.Generator().manual_seed(frames))


def errors_by_hand(published: VJEPA2Model, window: Tensor, context_frames: int) -> np.ndarray:
    """Of one window: [B, predicted steps], by Hugging Face's networks and numpy."""
    places = torch.arange(STEPS * SPACE).expand(len(window), -1)
    known = context_frames // 2 * SPACE
    predicted = prediction_by_hand(published, window, places[:, :known], places[:, known:]).numpy()
    tokens = tokens_of(published, window).numpy().astype(np.float64)
    centred = tokens - tokens.mean(-1, keepdims=True)
    normalised = centred / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    apart = np.abs(predicted - normalised[:, known:])
    return apart.reshape(len(window), STEPS - context_frames // 2, -1).mean(-1)


def test_the_score_is_what_the_networks_outputs_say(model: Model, published: VJEPA2Model) -> None:
    clip = random_clip(13)  # of which the last picture is in no tubelet
    found = model.surprise(clip, context_frames=(2, 4), stride=2)
    assert found.errors.shape == (2, 2, 3, STEPS)
    assert found.first_steps.tolist() == [0, 1, 2]
    by_step: dict[int, list[np.ndarray]] = {}
    windows = []
    for number, first in enumerate((0, 2, 4)):
        of_context = []
        for row, context in enumerate((2, 4)):
            expected = errors_by_hand(published, clip[:, :, first : first + FRAMES], context)
            assert found.errors[:, row, number, : context // 2].isnan().all()
            assert close(found.errors[:, row, number, context // 2 :], torch.from_numpy(expected))
            of_context.append(expected.mean(1))
            for step, value in enumerate(expected.T, start=(first + context) // 2):
                by_step.setdefault(step, []).append(value)
        windows.append(np.mean(of_context, axis=0))
    assert close(found.windows, torch.from_numpy(np.stack(windows, 1)))
    assert close(found.mean, torch.from_numpy(np.mean(windows, axis=0)))
    assert close(found.maximum, torch.from_numpy(np.max(windows, axis=0)))
    assert sorted(by_step) == [1, 2, 3, 4, 5]
    assert found.curve[:, 0].isnan().all()
    assert close(found.curve[:, 1:], torch.from_numpy(np.stack([np.mean(by_step[s], axis=0) for s in range(1, 6)], 1)))


def test_no_pixel_after_the_context_tells_the_prediction(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other futures: the same predictions to the bit, other targets; another past: other predictions."""
    kept: list[Tensor] = []
    predict = Model.predict

    def kept_predict(*arguments: Any) -> Tensor:
        kept.append(predict(*arguments))
        return kept[-1]

    monkeypatch.setattr(Model, "predict", kept_predict)
    clip = random_clip(FRAMES, batch=1)
    found = model.surprise(clip, context_frames=4)
    for frame in range(4, FRAMES):
        other = clip.clone()
        other[:, :, frame] += 1
        changed = model.surprise(other, context_frames=4)
        assert torch.equal(kept[-1], kept[0])
        # The targets see the whole window, so every step's error is another.
        assert (changed.errors != found.errors)[..., 2:].all()
    for frame in range(4):
        other = clip.clone()
        other[:, :, frame] += 1
        model.surprise(other, context_frames=4)
        assert not torch.equal(kept[-1], kept[0])
    assert kept[0].shape == (1, 2 * SPACE, 48)


def test_windows_and_seconds_of_a_long_video(model: Model, video: Path) -> None:
    """21 pictures, 10 tubelets: windows of 4 begin at every second one; of 9, one more window ends with the last."""
    found = model.surprise(video, stride=4)
    assert found.first_steps.tolist() == [0, 2, 4, 6]
    assert found.window_start_s.tolist() == pytest.approx([0, 0.8, 1.6, 2.4])
    assert found.window_end_s.tolist() == pytest.approx([1.6, 2.4, 3.2, 4.0])
    assert found.context_frames == (4,)
    later = model.surprise(video, stride=4, start=0.4)
    assert later.first_steps.tolist() == [0, 2, 4, 5]
    assert later.start_s.tolist() == pytest.approx([0.4 + 2 * k / FPS for k in range(9)])
    assert later.end_s.tolist() == pytest.approx([0.4 + 2 * (k + 1) / FPS for k in range(9)])
    assert later.curve.isnan().tolist() == [[True] * 2 + [False] * 7]
    # A window is the same however it was come by.
    clip = model.preprocess(np.stack(sampled(video, 20)))
    assert close(vjepa_scale.surprise(model, clip, stride=2, batch=3).windows[:, ::2], found.windows)
    assert close(model.surprise(clip[:, :, -9:-1]).windows[:, 0], later.windows[:, -1])


def test_a_few_windows_are_in_memory() -> None:
    taken: list[int] = []
    windows = sliding((taken.append(n) or n for n in range(1000)), tubelet=2, window=8, stride=4)
    assert next(windows) == (0, list(range(8)))
    assert next(windows) == (2, list(range(4, 12)))
    assert taken == list(range(12))


def test_settings_that_do_not_fit(model: Model) -> None:
    clip = random_clip(12)
    for settings, message in (
        ({"window": 14}, "a video of 12 frames, a window of 14"),
        ({"window": 7}, "surprise window: 7 frames"),
        ({"window": 2}, "surprise window: 2 frames"),
        ({"context_frames": 3}, "surprise context_frames: 3 frames"),
        ({"context_frames": 8}, "surprise context_frames: 8 frames (a multiple of 2 (the tubelet) from 2 to 6)"),
        ({"context_frames": (4, 0)}, "surprise context_frames: 0 frames"),
        ({"context_frames": ()}, "no length"),
        ({"stride": 1}, "surprise stride: 1 frames"),
        ({"stride": 6}, "surprise stride: 6 frames"),
        ({"fps": 0}, "0 pictures per second"),
        ({"start": -1}, "-1 s"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            model.surprise(clip, **settings)
    with pytest.raises(UserError, match="a video of 7 frames, a window of 8"):
        model.surprise(clip[:, :, :7])


@pytest.mark.parametrize(
    ("recipe", "token"),
    [
        ({}, 1),
        ({"masks": {"generators": [{"kind": "blocks"}, {"kind": "blocks"}, {"kind": "future"}]}}, 2),
        ({"masks": {"generators": [{"kind": "multi_rate"}, {"kind": "future"}]}}, 0),
        ({"masks": {"generators": [{"kind": "frame_dropout"}, {"kind": "blocks", "max_context_frames": 0.5}]}}, 1),
        ({"masks": {"generators": [{}, {}, {"kind": "future"}]}, "jepa": {"mask_token": "first"}}, 0),
    ],
)
def test_the_token_that_was_trained_on_the_future(
    model: Model, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], token: int
) -> None:
    monkeypatch.setattr(model, "config", model.config.model_copy(update={"recipe": recipe}))
    assert future_mask_token(model.config) == token
    clip = random_clip(FRAMES)
    assert torch.equal(model.surprise(clip).mean, model.surprise(clip, mask_token=token).mean)
    assert not torch.equal(model.surprise(clip).mean, model.surprise(clip, mask_token=token + 1).mean)
    past = clip[:, :, :4]
    assert torch.equal(model.rollout(past, frames=4).tokens, model.rollout(past, frames=4, mask_token=token).tokens)


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["surprise.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "surprise.py"))["main"]()


def test_the_command(
    model: Model, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    (videos / "more").mkdir(parents=True)
    (videos / "a.mp4").write_bytes(encoded(60, rate=20))
    (videos / "more" / "b.mp4").write_bytes(encoded(40, rate=10))
    (videos / "short.mp4").write_bytes(encoded(12, rate=20))
    run_tool(monkeypatch, checkpoint, videos, "--context", "2,4", "--curve", tmp_path / "curve.csv")
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert [Path(row["video"]).name for row in rows] == ["a.mp4", "b.mp4"]
    assert "short.mp4: surprise: a video of 3 frames" in err
    with (tmp_path / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    for row in rows:
        found = model.surprise(row["video"], context_frames=(2, 4))
        top = int(found.windows[0].argmax())
        assert int(row["windows"]) == found.windows.shape[1]
        for name, value in (
            ("mean", found.mean[0]),
            ("maximum", found.windows[0, top]),
            ("maximum_start_s", found.window_start_s[top]),
            ("maximum_end_s", found.window_end_s[top]),
        ):
            assert float(row[name]) == pytest.approx(value.item(), rel=1e-4)
        steps = [step for step in curve if step["video"] == row["video"]]
        assert [float(step["start_s"]) for step in steps] == pytest.approx(found.start_s.tolist())
        assert steps[0]["surprise"] == ""
        assert [float(step["surprise"]) for step in steps[1:]] == pytest.approx(found.curve[0, 1:].tolist(), rel=1e-4)
    with pytest.raises(UserError, match="none of 1 videos"):
        run_tool(monkeypatch, checkpoint, videos / "short.mp4")
    with pytest.raises(UserError, match="no such file or folder"):
        run_tool(monkeypatch, checkpoint, videos / "absent.mp4")
    with pytest.raises(UserError, match="--context"):
        run_tool(monkeypatch, checkpoint, videos, "--context", "two")


def test_a_picture_is_a_still_video(model: Model, tmp_path: Path) -> None:
    from tests.inference.test_clips import image_file

    image_file(tmp_path / "image.png", picture(3), "png", "rgb24")
    found = model.surprise(tmp_path / "image.png")
    assert torch.equal(found.mean, model.surprise(model.preprocess(picture(3))).mean)
