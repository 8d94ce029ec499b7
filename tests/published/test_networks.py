"""Networks against outputs of the published code: 1e-5 of the largest, float32 sums in another order."""

from collections.abc import Callable

import pytest
import torch

from tests.published import inputs
from tests.published.results import MODEL, filled, networks, relative
from vjepa_scale.model import Encoder
from vjepa_scale.model.positions import sincos_positions
from vjepa_scale.model.predictor import ActionPredictor
from vjepa_scale.model.probe import AttentiveProbe
from vjepa_scale.recipe.schema import ActionPredictorConfig, EncoderConfig, ModelConfig, PredictorConfig, SincosConfig

Record = Callable[[str, object], None]


@pytest.mark.parametrize("name", inputs.ACTION_CASES)
@torch.no_grad()
def test_action_predictor(name: str, record_property: Record) -> None:
    case = inputs.ACTION_CASES[name]
    config = ActionPredictorConfig(
        width=inputs.ACTION_WIDTH,
        depth=inputs.ACTION_DEPTH,
        heads=inputs.ACTION_HEADS,
        mlp_hidden=4 * inputs.ACTION_WIDTH,
        extrinsics=case.extrinsics,
        grid=(case.pretrained, case.pretrained),
    )
    predictor = filled(ActionPredictor(config, encoder_width=inputs.WIDTH), "action_predictor")
    tokens, actions, states, extrinsics = (torch.from_numpy(x) for x in inputs.action_inputs(name))
    ours = predictor(tokens, actions, states, extrinsics if case.extrinsics else None, grid=case.grid)
    difference = relative(ours, networks()[f"action_predictor.{name}"])
    record_property("measured", f"{difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("depth", inputs.PROBE_DEPTHS)
@torch.no_grad()
def test_attentive_probe(depth: int, record_property: Record) -> None:
    probe = AttentiveProbe(
        width=inputs.PROBE_WIDTH, heads=inputs.PROBE_HEADS, classes=inputs.PROBE_CLASSES, depth=depth
    )
    ours = filled(probe, "probe")(torch.from_numpy(inputs.probe_tokens()))
    difference = relative(ours, networks()[f"probe.{depth}"])
    record_property("measured", f"{difference:.1e}")
    assert difference <= 1e-5


@torch.no_grad()
def test_encoder_on_clips_that_are_not_square(record_property: Record) -> None:
    encoder = filled(Encoder(MODEL), "encoder")
    clips, keep = torch.from_numpy(inputs.values("wide clip", inputs.WIDE_CLIP)), networks()["encoder.keep"]
    every = relative(encoder(clips), networks()["encoder.all"])
    kept = relative(encoder(clips, keep), networks()["encoder.kept"])
    record_property("measured", f"all tokens {every:.1e}, kept tokens {kept:.1e}")
    assert max(every, kept) <= 1e-5


@pytest.mark.parametrize(("table", "clip"), inputs.SINCOS_CASES)
def test_sine_cosine_positions(table: str, clip: str) -> None:
    """Of their own geometry, of its first times, and interpolated; a table of images has one frame."""
    frames, uniform = inputs.SINCOS_TABLES[table]
    tubelet = 1 if frames == 1 else inputs.TUBELET
    config = ModelConfig(
        encoder=EncoderConfig(width=inputs.SINCOS_WIDTH, depth=1, heads=2),
        predictor=PredictorConfig(width=24, heads=2),
        patch=inputs.SINCOS_PATCH,
        tubelet=tubelet,
        positions="sincos",
        sincos=SincosConfig(frames=frames, size=(inputs.SINCOS_SIZE,) * 2, uniform_power=uniform),
    )
    length, height, width = inputs.SINCOS_CLIPS[clip]
    grid = (1 if frames == 1 else length // tubelet, height // config.patch, width // config.patch)
    ours = sincos_positions(None, grid=grid, width=inputs.SINCOS_WIDTH, config=config)
    torch.testing.assert_close(ours[None], networks()[f"sincos.{table}.{clip}"], rtol=0, atol=1e-6)
