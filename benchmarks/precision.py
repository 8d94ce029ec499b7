"""Measures errors of bfloat16 against float32: our networks under FSDP2, and the published ones under autocast.

All have the same weights, clips and masks. Compares targets (after the LayerNorm without parameters; relative L2
distance of a token, mean and largest), the loss, and the gradient of all weights (relative). ``--gain`` multiplies the
initial weights: at 1 a network is close to the identity. Needs a checkout of the published code.

    OMP_NUM_THREADS=1 python benchmarks/precision.py --peer ../vjepa2 --model vit_small --frames 8 --size 64
"""

import argparse
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from published import Published
from step import RANKS, random_batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vjepa_scale.core.errors import run_command
from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import Recipe, load_recipe, stages_of

ROOT = Path(__file__).parents[1]


@dataclass
class Found:
    loss: float
    targets: Tensor
    gradient: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, metavar="FOLDER", help="a checkout of the published code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="vit_small")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--gain", type=float, default=1.0, help="of matrices at the start")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(
        ROOT / "recipes" / "vitg_256.yaml",
        [
            f"engine.device={arguments.device}",
            "engine.activation_checkpointing=none",
            "engine.compile=false",  # Inductor rounds less often; both sides are compared as written
            f"model.encoder={arguments.model}",
            f"masks.group={arguments.batch}",
            f"pretrain.clip={{frames: {arguments.frames}, size: {arguments.size}}}",
            f"pretrain.global_batch={arguments.batch}",
            f"pretrain.micro_batch={arguments.batch}",
            "cooldown=null",
            "jepa.mask_token=first",
            *arguments.overrides,
        ],
    )
    phase = stages_of(recipe)["pretrain"].phases[0]
    with tempfile.TemporaryDirectory() as folder:
        process_group.start(RANKS, recipe.engine, rendezvous=Path(folder))
        # First, because it may refuse the folder or the recipe.
        published = Published(arguments.peer, recipe, phase, process_group.pick_device(recipe.engine, RANKS))
        batch = random_batch(recipe, phase, 0)
        exact, weights = _ours(recipe, batch, "float32", arguments.gain)
        rows = {"ours, bf16 by FSDP2": _ours(recipe, batch, "bfloat16", arguments.gain)[0]}
        published.load(weights)
        given = published.given(batch)
        rows["published, float32"] = _published(published, given, autocast=False)
        with _layer_norm_in_float32(arguments.device):
            rows["published, autocast"] = _published(published, given, autocast=True)
        process_group.stop()
    print(
        f"{arguments.model}, {arguments.frames} frames of {arguments.size} px, gain {arguments.gain:g}, loss ", end=""
    )
    print(f"{exact.loss:.4f}\n\n| beside our float32 | targets | largest | loss | gradient |\n|---|---|---|---|---|")
    for name, row in rows.items():
        error = (row.targets - exact.targets).norm(dim=-1) / exact.targets.norm(dim=-1)
        gradient = float((row.gradient - exact.gradient).norm() / exact.gradient.norm())
        loss = abs(row.loss - exact.loss) / exact.loss
        print(f"| {name} | {error.mean():.1e} | {error.max():.1e} | {loss:.1e} | {gradient:.1e} |")
    return 0


def _ours(recipe: Recipe, batch: MicroBatch, precision: str, gain: float) -> tuple[Found, dict[str, Tensor]]:
    engine = build_engine(recipe.engine.model_copy(update={"precision": precision}), RANKS)
    objective = Jepa(stages_of(recipe)["pretrain"], engine)
    engine.start_optimizer(recipe.optimizer, objective.trained)
    tensors = engine.tensors(objective.networks, optimizer=False)
    for name, tensor in tensors.items():
        _strengthen(name, tensor, gain)
    with _output_of(objective.target_encoder) as features:
        loss = engine.backward(lambda: objective.loss(batch)["loss"], share=1.0, last=True)
    whole = {name: _whole(tensor).clone() for name, tensor in tensors.items()}
    return Found(float(loss), _normalised(features[0]), _gradient(objective.trained)), whole


@torch.no_grad()
def _strengthen(name: str, tensor: Tensor, gain: float) -> None:
    """Scales matrices, and makes biases nonzero and norms different from 1, equal in encoder and target encoder."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if tensor.ndim > 1:
        local.mul_(gain)
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("target_").encode()))
        local.add_(0.1 * torch.randn(local.shape, generator=generator).to(local.device))


def _published(published: Published, given: tuple[Any, ...], *, autocast: bool) -> Found:
    for network in published.networks.values():
        network.zero_grad()
    with _output_of(published.networks["target_encoder"]) as features:
        loss = published.loss(*given, autocast=autocast)
    loss.backward()
    return Found(float(loss.detach()), _normalised(features[0]), _gradient(published.networks))


@contextmanager
def _layer_norm_in_float32(device: str) -> Iterator[None]:
    """Computes LayerNorm in float32, as autocast does on a GPU; on a CPU autocast would use bf16."""
    if device != "cpu":
        yield
        return
    original: Callable[..., Tensor] = F.layer_norm

    def layer_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(x.float(), *args, **kwargs)

    with patch.object(F, "layer_norm", layer_norm):
        yield


@contextmanager
def _output_of(network: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handle = network.register_forward_hook(lambda _, __, output: outputs.append(output.detach().float()))
    yield outputs
    handle.remove()


def _normalised(features: Tensor) -> Tensor:
    return F.layer_norm(features, features.shape[-1:])


def _gradient(networks: Mapping[str, nn.Module]) -> Tensor:
    """Returns the concatenated gradients of encoder and predictor, float64."""
    trained = [p for name in ("encoder", "predictor") for p in networks[name].parameters()]
    return torch.cat([_whole(p.grad).flatten().double() for p in trained if p.grad is not None])


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    run_command(main)
