"""A tiny job of JEPA's shape, twice: through the engine on any number of ranks, and in plain PyTorch.

Per step and micro-batch: the target network without gradient, two passes of encoder and predictor, one
backward. The grid is 2 × 2 × 3 tokens, so that height and width cannot be swapped unnoticed.
"""

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed.engine import Engine, build_engine
from vjepa_scale.distributed.optim import TOGETHER
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.recipe.schema import EncoderConfig, EngineConfig, ModelConfig, PredictorConfig
from vjepa_scale.recipe.stage_sections import OptimizerConfig

# Width 36 does not divide by 2 or 4 ranks evenly everywhere: uneven and empty shards occur. No mask has the third mask
# token: no gradient reaches it.
MODEL = ModelConfig(
    encoder=EncoderConfig(width=36, depth=2, heads=3),
    predictor=PredictorConfig(width=18, depth=1, heads=3, mlp_hidden=30, mask_tokens=3),
    patch=8,
)
GRID = (2, 2, 3)
CLIPS, STEPS, SEED = 8, 3, 5
MOMENTUM, RATE, DECAY = 0.9, 0.3, 0.04


@dataclass
class Outcome:
    """Per step: loss and gradient norm. At the end: all weights by canonical name, whole."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def start(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """Larger weights than a real start's, and no zeros: a few steps move the loss, and every parameter counts."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return 0.15 * torch.randn(shape, generator=generator) + (1.0 if "norm" in name and "weight" in name else 0.0)


def batch(step: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Clips [8, 3, 4, 16, 24] and two (context, target) pairs of token indices, other for each clip."""
    generator = torch.Generator().manual_seed(100 + step)
    clips = torch.randn(CLIPS, 3, 4, 16, 24, generator=generator)
    pairs = []
    for context_size in (7, 4):
        order = torch.stack([torch.randperm(12, generator=generator) for _ in range(CLIPS)])
        pairs.append((order[:, :context_size].sort().values, order[:, context_size:].sort().values))
    return clips, pairs


def loss_of(
    encoder: nn.Module,
    predictor: nn.Module,
    target_encoder: nn.Module,
    clips: Tensor,
    pairs: list[tuple[Tensor, Tensor]],
) -> Tensor:
    with torch.no_grad():
        wanted = F.layer_norm(target_encoder(clips), (MODEL.encoder.width,))
    losses = []
    for number, (context, target) in enumerate(pairs):
        predicted = predictor(encoder(clips, context), context, target, GRID, number)
        rows = torch.arange(len(clips))[:, None]
        losses.append((predicted - wanted[rows, target]).abs().mean())
    return (losses[0] + losses[1]) / 2


def train_sharded(
    ranks: Ranks,
    cfg: EngineConfig,
    kind: str = "sgd",
    rate: float = RATE,
    plant: Callable[[Engine], None] | None = None,
) -> Outcome:
    """This rank's part of the job, in micro-batches of one clip. plant: a bug, in the engine."""
    engine = build_engine(cfg, ranks)
    if plant is not None:
        plant(engine)
    with torch.device("meta"):
        encoder, predictor, target_encoder = Encoder(MODEL), Predictor(MODEL), Encoder(MODEL)
    engine.shard(encoder, name="encoder", seed=SEED, trainable=True, initial_value=start)
    engine.shard(predictor, name="predictor", seed=SEED, trainable=True, initial_value=start)
    engine.shard(target_encoder, name="encoder", seed=SEED, trainable=False, initial_value=start)
    engine.match_ema(target_encoder, encoder)
    engine.set_forward_order([target_encoder, encoder, predictor])
    trained = {"encoder": encoder, "predictor": predictor}
    unused = frozenset({"predictor.mask_tokens.2"})
    engine.start_optimizer(OptimizerConfig(kind=kind, weight_decay=DECAY), trained, unreached=unused)
    outcome = Outcome()
    share = CLIPS // engine.dp_world_size
    own = range(engine.dp_rank * share, (engine.dp_rank + 1) * share)
    for step in range(STEPS):
        clips, pairs = batch(step)
        total = torch.zeros(())
        for slot in own:
            one = slice(slot, slot + 1)
            loss = partial(
                loss_of, encoder, predictor, target_encoder, clips[one], [(c[one], t[one]) for c, t in pairs]
            )
            total += engine.backward(loss, share=1 / share, last=slot == own[-1])
        outcome.losses.append(float(engine.mean(total)))
        outcome.norms.append(engine.reduced(torch.zeros(0))[1][TOGETHER])
        engine.step(rate)
        engine.ema_update(target_encoder, encoder, MOMENTUM)
    everything = {**trained, "target_encoder": target_encoder}
    for name, tensor in engine.tensors(everything, optimizer=False).items():
        assert isinstance(tensor, DTensor)
        outcome.weights[name] = tensor.full_tensor().detach()
    return outcome


def train_plain(kind: str = "sgd", rate: float = RATE) -> Outcome:
    """The same job in one process: whole batch at once; SGD and EMA written out, AdamW PyTorch's own."""
    encoder, predictor = Encoder(MODEL), Predictor(MODEL)
    with torch.no_grad():
        for network, module in {"encoder": encoder, "predictor": predictor}.items():
            for name, parameter in module.named_parameters():
                parameter.copy_(start(f"{network}.{name}", parameter.shape, seed=SEED))
    target_encoder = copy.deepcopy(encoder)
    parameters = [*encoder.named_parameters(), *predictor.named_parameters()]
    flat = [p for name, p in parameters if name.endswith("bias") or p.ndim == 1]
    rest = [p for name, p in parameters if not (name.endswith("bias") or p.ndim == 1)]
    groups = [{"params": flat, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]
    adamw = torch.optim.AdamW(groups, lr=rate)
    outcome = Outcome()
    for step in range(STEPS):
        loss = loss_of(encoder, predictor, target_encoder, *batch(step))
        gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
        outcome.losses.append(float(loss.detach()))
        outcome.norms.append(sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5)
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                decay = 0.0 if name.endswith("bias") or parameter.ndim == 1 else DECAY
                if kind == "sgd":
                    parameter -= rate * (gradient + decay * parameter)
                parameter.grad = gradient
        if kind == "adamw":
            adamw.step()
        with torch.no_grad():
            for old, new in zip(target_encoder.parameters(), encoder.parameters(), strict=True):
                old.copy_(MOMENTUM * old + (1 - MOMENTUM) * new)
    for network, module in {"encoder": encoder, "predictor": predictor, "target_encoder": target_encoder}.items():
        outcome.weights |= {f"{network}.{name}": p.detach().clone() for name, p in module.named_parameters()}
    return outcome
