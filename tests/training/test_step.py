"""Whole training steps against Hugging Face's V-JEPA 2 model with PyTorch's own AdamW and an EMA written out.

Nothing of ours is on the other side but the fixed clips and masks: the model, the rotary positions, the loss, the
optimiser's groups and the average are transformers', torch's and this file's.
"""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from transformers import VJEPA2Model

from tests.model.published import our_weights, random_published
from tests.processes import ENGINE, run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MaskPair, MicroBatch
from vjepa_scale.distributed.fsdp import FsdpEngine
from vjepa_scale.distributed.optim import named_parameters
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import stages_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.training.step import training_step

pytestmark = pytest.mark.distributed

STEPS, CLIPS, SIZE, FRAMES = 3, 4, 32, 4
RATE, DECAY, MOMENTUM, EPS = 1e-2, 0.04, 0.9, 1e-5  # eps damps Adam where the true gradient is 0

RECIPE = validate_recipe(
    {
        "run": {"dir": "unused"},
        "data": {"sets": {"a": {"path": "unused"}}},
        "model": {
            "encoder": {"width": 48, "depth": 2, "heads": 2},
            "predictor": {"width": 24, "depth": 2, "heads": 2, "mask_tokens": 1},  # Hugging Face always takes one
            "patch": 8,
        },
        "masks": {"group": CLIPS},
        "jepa": {"ema_momentum": MOMENTUM},
        "optimizer": {"weight_decay": DECAY, "eps": EPS},
        "pretrain": {
            "steps": STEPS,
            "clip": {"frames": FRAMES, "size": SIZE},
            "global_batch": CLIPS,
            "micro_batch": 1,
            "phases": [{"name": "all", "start_lr": RATE}],
        },
    },
    source="test",
)


# Frames of the four clips: of one geometry; and of three, so that two ranks compute different ones at a time.
SAME, MIXED = (FRAMES,) * CLIPS, (FRAMES, 2, 6, FRAMES)
# Of the gradient's norm, where it is clipped.
LIMIT = 0.12


def fixed_batch(step: int, frames: tuple[int, ...] = SAME) -> list[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
    """Per clip: uint8 [1, 3, T, 32, 32] and two pairs of sorted token indices [1, n]."""
    generator = torch.Generator().manual_seed(step)
    clips = []
    for T in frames:
        clip = torch.randint(0, 256, (1, 3, T, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        tokens, pairs = T // 2 * 4 * 4, []
        for context in (tokens * 3 // 8, tokens * 5 // 32):
            order = torch.randperm(tokens, generator=generator)[None]
            targets = order[:, context : context + tokens * 15 // 32]
            pairs.append((order[:, :context].sort().values, targets.sort().values))
        clips.append((clip, pairs))
    return clips


def published() -> VJEPA2Model:
    return random_published(RECIPE.model, crop=SIZE, frames=FRAMES, seed=3)


@functools.cache
def reference(frames: tuple[int, ...], limit: float | None) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms before clipping and the final weights by our names, by transformers and torch."""
    student = published().train()
    teacher = copy.deepcopy(student.encoder).requires_grad_(False)
    named = dict(student.named_parameters())
    decayed = [p for name, p in named.items() if not name.endswith("bias") and _rank(name, p) > 1]
    rest = [p for name, p in named.items() if name.endswith("bias") or _rank(name, p) <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}], lr=RATE, eps=EPS
    )
    losses, norms = [], []
    for step in range(STEPS):
        loss = torch.stack([_clip_loss(student, teacher, *clip) for clip in fixed_batch(step, frames)]).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(
            float(
                torch.stack([p.grad.double().square().sum() for p in named.values() if p.grad is not None]).sum().sqrt()
            )
        )
        if limit is not None:
            nn.utils.clip_grad_norm_(student.parameters(), limit)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.encoder.parameters(), strict=True):
                old.mul_(MOMENTUM).add_(new, alpha=1 - MOMENTUM)
    weights = _named(student)
    student.encoder = teacher
    weights |= {f"target_{name}": value for name, value in _named(student).items() if name.startswith("encoder.")}
    return losses, norms, weights


def _clip_loss(student: VJEPA2Model, teacher: nn.Module, clip: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    video = ((clip / 255 - mean) / std).transpose(1, 2)  # [1, T, C, H, W]
    features = teacher(video).last_hidden_state
    wanted = (features - features.mean(-1, keepdim=True)) / (features.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    loss = torch.zeros(())
    for context, target in pairs:
        # transformers' encoder sees every token: run it on the kept ones as ours does, by its own layers.
        kept = student.encoder.embeddings(video).gather(1, context[..., None].expand(-1, -1, 48))
        for layer in student.encoder.layer:
            out = layer(kept, context)
            kept = out[0] if isinstance(out, tuple) else out
        kept = student.encoder.layernorm(kept)
        whole = torch.zeros_like(wanted).scatter(1, context[..., None].expand(-1, -1, 48), kept)
        predicted = student.predictor(whole, [context], [target]).last_hidden_state
        loss = loss + (predicted - wanted.gather(1, target[..., None].expand(-1, -1, 48))).abs().mean() / 2
    return loss


def _rank(name: str, parameter: Tensor) -> int:
    return 3 if name.endswith("mask_tokens") else parameter.ndim


def _named(model: VJEPA2Model) -> dict[str, Tensor]:
    encoder, predictor = our_weights(model)
    return {f"encoder.{n}": v.clone() for n, v in encoder.items()} | {
        f"predictor.{n}": v.clone() for n, v in predictor.items()
    }


def ours(
    ranks: Ranks, frames: tuple[int, ...], limit: float | None
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    engine = FsdpEngine(ENGINE, ranks)
    objective = Jepa(stages_of(RECIPE)["pretrain"], engine)
    encoder, predictor = our_weights(published())
    for network, weights in (
        (objective.encoder, encoder),
        (objective.target_encoder, encoder),
        (objective.predictor, predictor),
    ):
        _fill(network, weights)
    engine.start_optimizer(RECIPE.optimizer, objective.trained)
    share = CLIPS // ranks.world_size
    losses, norms = [], []
    for step in range(STEPS):
        mine = range(ranks.rank * share, (ranks.rank + 1) * share)
        batch = [_micro_batch(step, slot, *fixed_batch(step, frames)[slot]) for slot in mine]
        result = training_step(objective, engine, batch, lr=RATE, clip_grad_norm=limit)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    final = {
        f"{n}.{k}": p.full_tensor().detach()  # type: ignore[attr-defined]
        for n, network in objective.networks.items()
        for k, p in network.named_parameters()
    }
    return losses, norms, final


def ours_of_both(ranks: Ranks) -> dict[tuple[int, ...], tuple[list[float], list[float], dict[str, Tensor]]]:
    return {frames: ours(ranks, frames, limit) for frames, limit in ((SAME, None), (MIXED, LIMIT))}


@functools.cache
def found_by(world_size: int) -> dict[tuple[int, ...], tuple[list[float], list[float], dict[str, Tensor]]]:
    """Both batches by the same processes: their start takes longer than the steps."""
    return run_processes(ours_of_both, world_size)[0]


def _micro_batch(step: int, slot: int, clip: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> MicroBatch:
    return MicroBatch(clip, tuple(MaskPair(*pair) for pair in pairs), step, range(slot, slot + 1), ("a",))


@torch.no_grad()
def _fill(network: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        parameter.copy_(distribute_tensor(weights[name], mesh, placements))


@pytest.mark.parametrize(
    ("world_size", "frames", "limit"), [(1, SAME, None), (2, SAME, None), (1, MIXED, LIMIT), (2, MIXED, LIMIT)]
)
def test_three_steps_equal_the_published_models(world_size: int, frames: tuple[int, ...], limit: float | None) -> None:
    """Loss 1e-5, gradient norm 1e-4, weights 1e-5: float32 sums in another order, three steps of AdamW."""
    losses, norms, weights = reference(frames, limit)
    assert limit is None or min(norms) < limit < max(norms)  # some steps are clipped, others are not
    found_losses, found_norms, found = found_by(world_size)[frames]
    assert max(losses) - min(losses) > 0.001
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found_norms == pytest.approx(norms, rel=1e-4)
    assert found.keys() == weights.keys()
    start = our_weights(published())[0]["blocks.0.mlp.fc1.weight"]
    assert (weights["encoder.blocks.0.mlp.fc1.weight"] - start).abs().mean() > 1e-4  # ten times the tolerance
    for name, value in weights.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def nothing_moves(ranks: Ranks) -> list[str]:
    from vjepa_scale.training.step import NonFiniteLossError

    engine = FsdpEngine(ENGINE, ranks)
    objective = Jepa(stages_of(RECIPE)["pretrain"], engine)
    engine.start_optimizer(RECIPE.optimizer, objective.trained)
    named = named_parameters(objective.trained)
    batch = [_micro_batch(0, 0, *fixed_batch(0)[0])]
    if ranks.rank == 1:  # one rank's weights alone are enough to spoil the sum of all
        with torch.no_grad():
            next(iter(objective.encoder.parameters())).to_local().fill_(float("nan"))  # type: ignore[attr-defined]
    before = {name: p.full_tensor().clone() for name, p in named}  # type: ignore[attr-defined]
    try:
        training_step(objective, engine, batch, lr=RATE)
    except NonFiniteLossError as error:
        after = {name: p.full_tensor() for name, p in named}  # type: ignore[attr-defined]
        assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)
        assert all(p.grad is None for _, p in named)
        return [str(error)]
    return []


def test_a_loss_that_is_not_a_number_moves_nothing_on_any_rank() -> None:
    for (message,) in run_processes(nothing_moves, 2):
        assert "nan" in message
