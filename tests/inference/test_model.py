"""encode, predict and rollout, against Hugging Face's VJEPA2Model on clips decoded by PyAV."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import VJEPA2Model

from tests.inference.checkpoint import FPS, FRAMES, GRID, SIZE
from tests.inference.judge import clip_of, close, sampled, tokens_of
from tests.videos import encoded
from vjepa_scale import load_encoder, load_model
from vjepa_scale.core.errors import UserError
from vjepa_scale.inference.model import Model

SPACE = GRID[1] * GRID[2]
# Features of pixels that are off by the rounding of the resize to uint8 (judge.PIXEL): measured 0.5 to 1 %.
ROUNDED = 0.03


def chunks_by_hand(published: VJEPA2Model, clip: Tensor, chunk: int) -> Tensor:
    """Every chunk through the encoder by itself; the last are the last ``chunk`` frames, whose new tokens count."""
    frames = clip.shape[2]
    if frames % 2:
        clip = torch.cat([clip, clip[:, :, -1:]], dim=2)
    tokens = [tokens_of(published, clip[:, :, i : i + chunk]) for i in range(0, frames - chunk + 1, chunk)]
    done = len(tokens) * chunk
    if done < frames:
        last = tokens_of(published, clip[:, :, -chunk:])
        tokens.append(last[:, -(clip.shape[2] - done) // 2 * SPACE :])
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("chunk", [None, 4, 10, 20])
def test_chunks_of_a_file_are_separate_calls(
    model: Model, published: VJEPA2Model, video: Path, chunk: int | None
) -> None:
    pictures = sampled(video, 20)
    assert len(pictures) == 21
    features = model.encode(video, chunk)
    # The pixels by our resize, in order to compare features to the last digits; that these are right: below.
    clip = model.preprocess(np.stack(pictures))
    assert close(features.tokens, chunks_by_hand(published, clip, chunk or FRAMES))
    assert close(features.tokens, chunks_by_hand(published, clip_of(pictures), chunk or FRAMES), ROUNDED)
    assert features.grid == (11, GRID[1], GRID[2])
    assert features.tokens.shape == (1, 11 * SPACE, 48)
    assert features.start_s.tolist() == pytest.approx([2 * k / FPS for k in range(11)])
    # 21 pictures, 4.2 s: the last step shows one picture, and does not claim a second.
    assert features.end_s.tolist() == pytest.approx([2 * k / FPS for k in range(1, 11)] + [4.2])


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 8, 9, 12, 15, 16])
def test_clips_of_any_length(model: Model, published: VJEPA2Model, frames: int) -> None:
    clip = torch.randn(2, 3, frames, SIZE, SIZE, generator=torch.Generator().manual_seed(frames))
    features = model.encode(clip, 8)
    if frames < 8:
        whole = torch.cat([clip, clip[:, :, -1:]], dim=2) if frames % 2 else clip
        assert close(features.tokens, tokens_of(published, whole))
    else:
        assert close(features.tokens, chunks_by_hand(published, clip, 8))
    assert features.start_s.tolist() == pytest.approx([k / FPS for k in range(0, frames, 2)])
    assert features.end_s.tolist() == pytest.approx([min(k + 2, frames) / FPS for k in range(0, frames, 2)])


def test_start_and_rate(model: Model, video: Path) -> None:
    features = model.encode(video, fps=10, start=1.5, size=24)
    pictures = sampled(video, 20, fps=10, start_s=1.5)
    assert torch.equal(features.tokens, model.encode(model.preprocess(np.stack(pictures), size=24)).tokens)
    assert features.start_s[:2].tolist() == pytest.approx([1.5, 1.7])
    assert features.end_s[-1].item() == pytest.approx(4.2)
    assert features.grid == (14, 3, 3)


def test_one_chunk_is_in_memory_at_a_time(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are decoded as they are needed: when the first chunk is there, the rest has not been read."""
    path = tmp_path / "long.mp4"
    path.write_bytes(encoded(200, rate=5, gop=10))
    taken = []
    from vjepa_scale.inference import clips

    cropped = clips.cropped
    monkeypatch.setattr(clips, "cropped", lambda *args: taken.append(1) or cropped(*args))
    parts = model.encode_chunks(path)
    for chunk in (1, 2, 3):
        next(parts)
        assert len(taken) == chunk * FRAMES
    parts.close()


def test_layers(model: Model, checkpoint: Path, published: VJEPA2Model) -> None:
    clip = torch.randn(1, 3, FRAMES, SIZE, SIZE)
    with torch.no_grad():
        hidden = published.encoder.embeddings(clip.transpose(1, 2))
        expected = []
        for layer in published.encoder.layer:
            hidden = layer(hidden, None)[0]
            expected.append(published.encoder.layernorm(hidden))
        two = load_encoder(checkpoint).layers(clip, [0, 2])
    assert close(torch.stack(two), torch.stack([expected[0], expected[2]]))
    features = model.encode(clip, layers=[1, -1])
    assert close(features.tokens, torch.stack([expected[1], expected[2]], dim=1))
    with pytest.raises(UserError, match="no block 3"):
        model.encode(clip, layers=[3])


@torch.no_grad()
def prediction_by_hand(
    published: VJEPA2Model, clip: Tensor, context: Tensor, target: Tensor, mask_token: int = 1
) -> Tensor:
    """The encoder on the context's tokens alone, then the predictor: Hugging Face's layers, one after the other."""
    hidden = published.encoder.embeddings(clip.transpose(1, 2))
    hidden = hidden.gather(1, context[..., None].expand(-1, -1, hidden.shape[-1]))
    for layer in published.encoder.layer:
        hidden = layer(hidden, context)[0]
    hidden = published.encoder.layernorm(hidden)
    # Its predictor takes tokens of the whole clip, and picks the context's.
    count = clip.shape[2] // 2 * SPACE
    everywhere = torch.full((len(clip), count, hidden.shape[-1]), torch.nan).scatter(
        1, context[..., None].expand_as(hidden), hidden
    )
    tokens = published.predictor.embeddings.mask_tokens
    kept = tokens.clone()
    tokens[1] = kept[mask_token]  # its forward has no choice: always 1
    try:
        return published.predictor(everywhere, [context], [target]).last_hidden_state
    finally:
        tokens.copy_(kept)


def random_places(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = GRID[0] * SPACE
    shuffled = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)])
    clip = torch.randn(2, 3, FRAMES, SIZE, SIZE, generator=generator)
    return clip, shuffled[:, : count // 3], shuffled[:, count // 2 :]


@pytest.mark.parametrize("mask_token", [None, 0, 2])
def test_predictions(model: Model, published: VJEPA2Model, mask_token: int | None) -> None:
    clip, context, target = random_places(3)
    chosen = {} if mask_token is None else {"mask_token": mask_token}
    expected = prediction_by_hand(published, clip, context, target, **chosen)
    assert close(model.predict(clip, context, target, **chosen), expected)
    same = model.predict(clip, context[1], target[1], **chosen)[1]
    assert close(same, expected[1])


def test_predictions_do_not_see_what_is_not_context(model: Model) -> None:
    clip, context, target = random_places(4)
    context, target = context[:1].expand(2, -1), target[:1].expand(2, -1)
    known = torch.zeros(GRID[0] * SPACE, dtype=torch.bool)
    known[context[0]] = True
    pixels = known.view(GRID).repeat_interleave(2, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    other = torch.where(pixels, clip, torch.nan)
    assert torch.equal(model.predict(clip, context, target), model.predict(other, context, target))
    assert not torch.equal(model.predict(clip + 0.1 * pixels, context, target), model.predict(clip, context, target))


@pytest.mark.parametrize("frames", [2, 6])
def test_rollout_predicts_later_steps_from_the_past(model: Model, published: VJEPA2Model, frames: int) -> None:
    """Hugging Face is given a future, of NaN: neither its context nor ours looks at it."""
    past = torch.randn(2, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(frames))
    whole = torch.cat([past, torch.full((2, 3, frames, SIZE, SIZE), torch.nan)], dim=2)
    known = GRID[0] * SPACE
    places = torch.arange(known + frames // 2 * SPACE).expand(2, -1)
    future = model.rollout(past, frames=frames)
    assert close(future.tokens, prediction_by_hand(published, whole, places[:, :known], places[:, known:]))
    assert future.grid == (frames // 2, *GRID[1:])
    assert future.start_s.tolist() == pytest.approx([(FRAMES + k) / FPS for k in range(0, frames, 2)])
    assert future.end_s.tolist() == pytest.approx([(FRAMES + k + 2) / FPS for k in range(0, frames, 2)])


def test_arguments_that_do_not_fit(model: Model, checkpoint: Path) -> None:
    clip = torch.zeros(1, 3, FRAMES, SIZE, SIZE)
    place = torch.tensor([0])
    for call, message in (
        (lambda: model.encode(clip, 3), "chunks of 3 frames"),
        (lambda: model.encode(clip.byte()), "torch.uint8 of shape"),
        (lambda: model.encode(clip[0]), "of shape [3, 8, 32, 32]"),
        (lambda: model.encode(clip[:, :, :0]), "of shape [1, 3, 0, 32, 32]"),
        (lambda: model.encode(clip[..., :30]), "does not divide"),
        (lambda: model.predict(clip, place, torch.tensor([64])), "predict target: no such token"),
        (lambda: model.predict(clip, torch.tensor([-1]), place), "predict context: no such token"),
        (lambda: model.predict(clip, place[:0], place), "predict context: no such token"),
        (lambda: model.predict(clip, place.int(), place), "predict context: torch.int32"),
        (lambda: model.predict(clip, place.expand(3, 1), place), "predict context: torch.int64 of shape [3, 1]"),
        (lambda: model.rollout(clip, frames=3), "3 frames to predict"),
        (lambda: model.rollout(clip[:, :, :7], frames=2), "does not divide"),
        (lambda: load_model(checkpoint / "nowhere"), "no such file"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            call()


def test_bfloat16_inside_float32_outside(checkpoint: Path, model: Model) -> None:
    half = load_model(checkpoint, dtype=torch.bfloat16)
    clip, context, target = random_places(5)
    for ours, exact in (
        (half.encode(clip).tokens, model.encode(clip).tokens),
        (half.predict(clip, context, target), model.predict(clip, context, target)),
    ):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, exact)
        assert close(ours, exact, 0.05)  # bfloat16 has three digits
