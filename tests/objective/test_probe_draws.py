"""Several draws of labels at once: each probe learns from the clips of its own draw alone, whoever computes them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.processes import run_processes
from tests.training.probe_material import CLASSES, probe_recipe
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.model.probe import AttentiveProbe
from vjepa_scale.objective.probe import Probes
from vjepa_scale.recipe import Recipe, stages_of

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
DRAWS = torch.tensor([2, 0, 0, 2, 0, 2, 2, 0])  # none is of draw 1; the second half has one of draw 0


def clips() -> Tensor:
    return torch.randint(0, 256, (8, 3, 2, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def trained(ranks: Ranks, recipe: Recipe) -> dict[str, dict[str, Tensor]]:
    """Weights before, and gradients of one step over eight clips, half of them on each of two ranks."""
    engine = build_engine(recipe.engine, ranks)
    manifests = {"train": SimpleNamespace(classes=list(CLASSES))}
    probes = Probes(stages_of(recipe)["probe"], engine, manifests, {})  # type: ignore[arg-type]
    rows = torch.arange(8).chunk(ranks.world_size)[ranks.rank]
    batch = MicroBatch(
        clips()[rows],
        (),
        0,
        range(8),
        ("train",) * len(rows),
        extras={"labels": LABELS[rows], "label_draws": DRAWS[rows]},
    )
    weights = {name: _whole(probe, grad=False) for name, probe in probes.probes.items()}
    probes.loss(batch)["loss"].backward()
    return {"weights": weights, "gradients": {name: _whole(probe, grad=True) for name, probe in probes.probes.items()}}


def _whole(probe: torch.nn.Module, *, grad: bool) -> dict[str, Tensor]:
    found = {}
    for name, parameter in probe.named_parameters():
        value = parameter.grad if grad else parameter
        assert value is not None, name
        found[name] = value.full_tensor().detach().clone()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_probe_gets_the_gradient_of_its_own_draw(world_size: int, tmp_path: Path) -> None:
    """Against plain PyTorch: the mean cross-entropy over a draw's clips, times its share of the clips, times draws."""
    recipe = probe_recipe(tmp_path, {"train": tmp_path, "held_out": tmp_path}, labels_per_class=1, label_draws=3)
    found = run_processes(trained, world_size, recipe)[0]
    assert sorted(found["gradients"]) == [f"probe_{n:02d}" for n in range(6)]  # three draws of two settings
    encoder = Encoder(recipe.model).eval()
    initialise(encoder, seed=recipe.run.seed, prefix="encoder")
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (recipe.data.augment.mean, recipe.data.augment.std))
    with torch.no_grad():
        tokens = encoder((clips() / 255 - mean) / std)
    for number in range(6):
        name, own = f"probe_{number:02d}", number // 2 == DRAWS
        probe = AttentiveProbe(width=32, heads=2, classes=3, depth=2, eps=1e-6)
        probe.load_state_dict(found["weights"][name])
        if own.any():
            loss = F.cross_entropy(probe(tokens[own]), LABELS[own]) * own.sum() / 8 * 3
            loss.backward()
        for key, parameter in probe.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert torch.allclose(found["gradients"][name][key], expected, rtol=1e-4, atol=1e-6), (name, key)
