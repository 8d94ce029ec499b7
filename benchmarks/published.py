"""Runs the training step of the published V-JEPA 2 code, from the user's checkout (for benchmarks/step.py).

Builds the published classes with the sizes of a recipe. The step follows ``app.vjepa.train``: autocast, target,
context, predictor, L1, backward, AdamW, EMA. There is no DistributedDataParallel, because there is one device.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.recipe import Phase, Recipe


class Parts(Protocol):
    """Times wrapped calls as parts of the step."""

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]: ...


class Published:
    """Encoder, predictor and target encoder of the published code, and its optimiser."""

    def __init__(self, checkout: Path, recipe: Recipe, phase: Phase, device: torch.device) -> None:
        transformer, predictor = _classes(checkout)
        _check_recipe(recipe, phase)
        self._recipe, self._device = recipe, device
        self._autocast = recipe.engine.precision == "bfloat16"
        torch.backends.cudnn.benchmark = True  # as in the published training
        cfg = recipe.model
        common = {
            "img_size": phase.size,
            "patch_size": cfg.patch,
            "num_frames": phase.frames,
            "tubelet_size": cfg.tubelet,
            "qkv_bias": True,
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
            "uniform_power": True,
            "use_sdpa": True,
            "use_rope": True,
            # The published code has no selective checkpointing.
            "use_activation_checkpointing": recipe.engine.activation_checkpointing != "none",
        }
        with device:
            self.networks: dict[str, nn.Module] = {
                "encoder": transformer(**common, **_sizes(cfg.encoder)),
                "predictor": predictor(
                    **common,
                    embed_dim=cfg.encoder.width,
                    predictor_embed_dim=cfg.predictor.width,
                    depth=cfg.predictor.depth,
                    num_heads=cfg.predictor.heads,
                    mlp_ratio=_ratio(cfg.predictor),
                    use_mask_tokens=True,
                    num_mask_tokens=cfg.predictor.mask_tokens,
                ),
                "target_encoder": transformer(**common, **_sizes(cfg.encoder)),
            }
        self.networks["target_encoder"].requires_grad_(False)
        encoder, predictor_, target = self.networks.values()
        self._calls: dict[str, Callable[..., Any]] = {"target": target, "context": encoder, "predictor": predictor_}
        self._optimizer = self._build_optimizer()
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._autocast and device.type == "cuda")

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Loads weights by canonical names, which are the published names with a network's prefix."""
        for prefix, network in self.networks.items():
            own = {
                name.removeprefix(f"{prefix}."): value
                for name, value in weights.items()
                if name.startswith(f"{prefix}.")
            }
            network.load_state_dict(own, strict=True)

    def compile(self) -> None:
        """Compiles each network as a whole, as in the published training."""
        for network in self.networks.values():
            network.compile()

    def given(self, batch: MicroBatch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns normalised clips and mask indices on the device; outside the step, since its loader does this."""
        augment = self._recipe.data.augment
        mean, std = (torch.tensor(x, device=self._device).view(1, 3, 1, 1, 1) for x in (augment.mean, augment.std))
        clips = (batch.clips.to(self._device).float() / 255.0 - mean) / std
        contexts = [pair.context.to(self._device) for pair in batch.masks]
        return clips, contexts, [pair.target.to(self._device) for pair in batch.masks]

    def loss(self, clips: Tensor, contexts: list[Tensor], targets: list[Tensor], *, autocast: bool) -> Tensor:
        """Returns the loss of one micro-batch. All pairs use mask token 0, as in runs with one clip length."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                features = self._calls["target"](clips)
                wanted = F.layer_norm(features, (features.size(-1),))
            predicted = []
            for context, target in zip(contexts, targets, strict=True):
                tokens = self._calls["context"](clips, context)
                predicted.append(self._calls["predictor"](tokens, context, target, mask_index=0))
            differences = [
                (one - wanted.gather(1, target[..., None].expand(-1, -1, wanted.size(-1)))).abs().mean()
                for one, target in zip(predicted, targets, strict=True)
            ]
            return torch.stack(differences).mean()

    def watched(self, clock: Parts) -> None:
        """Times the calls of the networks as parts of the clock's step."""
        self._calls = {part: clock.timed(part, call) for part, call in self._calls.items()}

    def step(self, given: tuple[Tensor, list[Tensor], list[Tensor]], *, lr: float, clock: Parts) -> float:
        def backward() -> Tensor:
            loss = self.loss(*given, autocast=self._autocast)
            self._scaler.scale(loss).backward()
            return loss

        def optimise() -> None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._scaler.unscale_(self._optimizer)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad()

        loss = clock.timed("backward", backward)()
        clock.timed("optimiser", optimise)()
        clock.timed("EMA", self._average)()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        momentum = self._recipe.jepa.ema_momentum
        averages: list[Tensor] = list(self.networks["target_encoder"].parameters())
        torch._foreach_mul_(averages, momentum)
        weights: list[Tensor] = list(self.networks["encoder"].parameters())
        torch._foreach_add_(averages, weights, alpha=1 - momentum)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        cfg = self._recipe.optimizer
        decayed, undecayed = list[nn.Parameter](), list[nn.Parameter]()
        for name in ("encoder", "predictor"):
            for own, parameter in self.networks[name].named_parameters():
                (undecayed if "bias" in own or parameter.ndim == 1 else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": cfg.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=cfg.betas, eps=cfg.eps)

    def held_bytes(self) -> int:
        """Returns bytes of weights and moments, which persist between steps."""
        weights = [p for network in self.networks.values() for p in network.parameters()]
        moments = [x for state in self._optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return sum(tensor.nbytes for tensor in [*weights, *moments])


def _classes(checkout: Path) -> tuple[Any, Any]:
    if not (checkout / "src" / "models" / "vision_transformer.py").is_file():
        raise UserError(
            "no checkout of the published code",
            where=checkout,
            fix="git clone https://github.com/facebookresearch/vjepa2, and give --peer that folder",
        )
    sys.path.insert(0, str(checkout.resolve()))
    warnings.filterwarnings("ignore", message=r".*sdp_kernel.* is deprecated", category=FutureWarning)
    if "timm" not in sys.modules and importlib.util.find_spec("timm") is None:
        # The published code imports its stochastic depth from timm. It is not called, since no path is dropped here.
        for name in ("timm", "timm.models", "timm.models.layers"):
            sys.modules[name] = ModuleType(name)
        sys.modules["timm.models.layers"].drop_path = None  # type: ignore[attr-defined]
    vision_transformer = importlib.import_module("src.models.vision_transformer")
    predictor = importlib.import_module("src.models.predictor")
    return vision_transformer.VisionTransformer, predictor.VisionTransformerPredictor


def _sizes(cfg: Any) -> dict[str, Any]:
    return {"embed_dim": cfg.width, "depth": cfg.depth, "num_heads": cfg.heads, "mlp_ratio": _ratio(cfg)}


def _ratio(cfg: Any) -> float:
    """Returns an MLP ratio: the published networks round width × ratio down, so half a channel is added."""
    return (cfg.mlp_hidden + 0.5) / cfg.width


def _check_recipe(recipe: Recipe, phase: Phase) -> None:
    """Raises UserError where the published code would compute something else."""
    for key, value, published in (
        ("model.positions", recipe.model.positions, "rope"),
        ("model.rope.layout", recipe.model.rope.layout, "tiled"),
        ("model.rope.grid", recipe.model.rope.grid, None),
        ("jepa.mask_token", recipe.jepa.mask_token, "first"),
        ("jepa.loss_exponent", recipe.jepa.loss_exponent, 1.0),
        ("optimizer.kind", recipe.optimizer.kind, "adamw"),
        ("pretrain.clip.size", phase.size[0], phase.size[1]),
    ):
        if value != published:
            raise UserError(
                f"{value}: the published code has {published}", where=key, fix=f"{key}={published} for a comparison"
            )
