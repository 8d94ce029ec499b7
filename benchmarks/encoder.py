"""Times our encoder and transformers' VJEPA2Model encoder of the same size, alternating in one process.

Both have random weights, and compute the same features from the same weights (tests/model/test_published.py).
Prints milliseconds per forward, and per forward and backward, of one batch in training mode: the best of
--repeats, ours and theirs alternating.

    python benchmarks/encoder.py --threads 1
    python benchmarks/encoder.py --device cuda --dtype bfloat16 --sizes 1024x24x16 --grids 8x16x16
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from vjepa_scale.core.errors import run_command
from vjepa_scale.model import Encoder
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig

PATCH, TUBELET = 8, 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["128x6x4", "192x12x3"], help="WIDTHxDEPTHxHEADS")
    parser.add_argument(
        "--grids", nargs="+", default=["4x4x4", "4x6x6", "4x8x8", "4x12x12"], help="tokens TxHxW, H = W"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.dtype}, {arguments.threads} threads,", end=" ")
    print(f"batch {arguments.batch}; ms, ours / transformers (theirs ÷ ours)\n")
    print(f"{'width':>5} {'depth':>5} {'tokens':>6} | {'forward':>28} | {'forward + backward':>28}")
    for size in arguments.sizes:
        for grid in arguments.grids:
            width, depth, heads = map(int, size.split("x"))
            t, h, w = map(int, grid.split("x"))
            ours, theirs = (network.to(device, dtype) for network in _encoders(width, depth, heads, t, h))
            clips = torch.randn(arguments.batch, 3, t * TUBELET, h * PATCH, w * PATCH, device=device, dtype=dtype)
            forward, both = _compare(ours, theirs, clips, arguments.repeats)
            print(f"{width:5} {depth:5} {t * h * w:6} | {_column(forward)} | {_column(both)}", flush=True)
    return 0


def _column(ms: list[float]) -> str:
    return f"{ms[0]:9.2f} / {ms[1]:9.2f} ({ms[1] / ms[0]:4.2f})"


def _encoders(width: int, depth: int, heads: int, t: int, h: int) -> tuple[nn.Module, nn.Module]:
    config = ModelConfig(
        encoder=EncoderConfig(width=width, depth=depth, heads=heads),
        predictor=PredictorConfig(),
        patch=PATCH,
        tubelet=TUBELET,
    )
    theirs = VJEPA2Model(
        VJEPA2Config(
            patch_size=PATCH,
            tubelet_size=TUBELET,
            crop_size=h * PATCH,
            frames_per_clip=t * TUBELET,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            pred_num_hidden_layers=1,
            attn_implementation="sdpa",
        )
    )
    return Encoder(config).train(), theirs.encoder.train()


def _compare(ours: nn.Module, theirs: nn.Module, clips: Tensor, repeats: int) -> tuple[list[float], list[float]]:
    """Returns milliseconds (ours, theirs) of a forward without gradients, and of a forward and backward."""

    def our_forward() -> Tensor:
        return ours(clips)

    def their_forward() -> Tensor:
        return theirs(clips.transpose(1, 2)).last_hidden_state

    with torch.no_grad():
        forward = _alternating((our_forward, their_forward), repeats, clips.device)
    trained = (_with_backward(our_forward, ours), _with_backward(their_forward, theirs))
    return forward, _alternating(trained, repeats, clips.device)


def _with_backward(forward: Callable[[], Tensor], network: nn.Module) -> Callable[[], Tensor]:
    def run() -> Tensor:
        network.zero_grad()
        loss = forward().float().square().mean()
        loss.backward()
        return loss

    return run


def _alternating(runs: tuple[Callable[[], Tensor], ...], repeats: int, device: torch.device) -> list[float]:
    """Returns milliseconds of each, the best of ``repeats`` rounds after one warm-up."""
    best = [float("inf")] * len(runs)
    for round_number in range(repeats + 1):
        for k, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number:
                best[k] = min(best[k], 1e3 * (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    run_command(main)
