"""What the action-conditioned predictor promises; tests/published compares its numbers with the published code's."""

import pytest
import torch
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.model.init import initial_value
from vjepa_scale.model.predictor import ActionPredictor
from vjepa_scale.recipe.schema import ActionPredictorConfig

STEPS, GRID, WIDTH = 4, (2, 3), 20


def small(extrinsics: bool = True) -> ActionPredictor:
    torch.manual_seed(0)
    config = ActionPredictorConfig(width=36, depth=2, heads=2, mlp_hidden=72, extrinsics=extrinsics, grid=GRID)
    return ActionPredictor(config, encoder_width=WIDTH).eval()


def inputs(steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, steps * GRID[0] * GRID[1], WIDTH), (1, steps, 7), (1, steps, 7), (1, steps, 6)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("changed", range(4), ids=["tokens", "actions", "states", "extrinsics"])
@torch.no_grad()
def test_a_step_sees_itself_and_what_came_before(changed: int) -> None:
    """A change at step 2 changes all predictions from step 2 on, and not one bit before it."""
    predictor, given = small(), inputs()
    before = predictor(*given).unflatten(1, (STEPS, -1))
    given[changed].unflatten(1, (STEPS, -1))[:, 2] += 1
    moved = (predictor(*given).unflatten(1, (STEPS, -1)) != before).any(-1)[0]
    assert moved.all(1).tolist() == moved.any(1).tolist() == [False, False, True, True]


@torch.no_grad()
def test_fewer_steps_are_a_prefix() -> None:
    predictor, given = small(), inputs()
    tokens_of_two = 2 * GRID[0] * GRID[1]
    shorter = predictor(given[0][:, :tokens_of_two], *(x[:, :2] for x in given[1:]))
    torch.testing.assert_close(shorter, predictor(*given)[:, :tokens_of_two], rtol=1e-5, atol=1e-5)


def test_every_parameter_takes_part() -> None:
    predictor = small()
    predictor(*inputs()).square().sum().backward()
    assert [n for n, p in predictor.named_parameters() if p.grad is None or not p.grad.any()] == []
    without = small(extrinsics=False)
    without(*inputs()[:3]).square().sum().backward()
    unused = [n for n, p in without.named_parameters() if p.grad is None]
    assert unused == ["extrinsics_encoder.weight", "extrinsics_encoder.bias"]


def test_published_size_and_starts() -> None:
    """About 300 M on ViT-g's tokens, built without memory; every parameter's name has a rule for its start."""
    with torch.device("meta"):
        predictor = ActionPredictor(ActionPredictorConfig(), encoder_width=1408)
    assert sum(p.numel() for p in predictor.parameters()) == pytest.approx(305e6, rel=0.01)
    for name, parameter in small().named_parameters():
        assert initial_value(f"action_predictor.{name}", parameter.shape, seed=0).shape == parameter.shape


def test_what_does_not_fit_is_refused() -> None:
    tokens, actions, states, extrinsics = inputs()
    with pytest.raises(UserError, match="24 tokens are not 4 steps of 3×3"):
        small()(tokens, actions, states, extrinsics, grid=(3, 3))
    with pytest.raises(UserError, match="extrinsics missing"):
        small()(tokens, actions, states)
    with pytest.raises(UserError, match="extrinsics given"):
        small(extrinsics=False)(tokens, actions, states, extrinsics)
