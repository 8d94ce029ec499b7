"""Runs the published V-JEPA 2 code and writes down what it computes.

    python -m tests.published.make PUBLISHED        # from the repository's root; about 10 seconds

PUBLISHED is a checkout of facebookresearch/vjepa2; the files here were made by commit
c2963a47433ecca0ad4f06ec28bcfa8cb5b5cefb with torch 2.13.0 (CPU). They hold results only: weights and inputs are drawn
by inputs.py.

    networks.safetensors   outputs of the action-conditioned predictor, of the attentive classifier and of the encoder
                           on clips that are not square; tables of sine-cosine positions
    steps.safetensors      three pretraining steps: per step mask indices, loss, learning rate and the norm of every
                           parameter's gradient; the third step's gradients
    action_steps.safetensors
                           three steps of action-conditioned training in two settings: per step loss, its two parts,
                           learning rate and gradients' norms; the third step's gradients; the predictor after it
    checkpoint.pt          what the published training saved after them: weights, EMA weights, optimiser
    strides.json           frame numbers that the published loader asks its decoder for, of videos of some lengths
    poses.json, plans.json actions between poses, poses after actions, and what the published planner plans

The published ``app.vjepa.train.main`` and ``app.vjepa_droid.train.main`` run as they are: a loader with given clips,
weights by name and small sizes are put in place of data sets, random weights and ViT-L. Third-party imports that are
not installed are empty stand-ins.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.published import inputs
from tests.published.make_action_steps import action_steps
from tests.published.make_plans import plans, poses

HERE = Path(__file__).parent
COMMIT = "c2963a47433ecca0ad4f06ec28bcfa8cb5b5cefb"
NOT_INSTALLED = {"timm", "decord", "torchvision", "PIL", "cv2", "pandas"}
# One entry: several are written in any order, and the same run should give the same bytes.
METADATA = {
    "made_by": f"python -m tests.published.make PUBLISHED, with https://github.com/facebookresearch/vjepa2 at {COMMIT}"
}

# Frames and rate of a video, frames per second and frames of the clip: longer than the window, equal, shorter, tiny.
STRIDES = [
    (300, 30.0, 4, 16),
    (300, 29.97, 4, 16),
    (300, 30000 / 1001, 4, 16),
    (250, 25.0, 4, 16),
    (600, 23.976, 4, 64),
    (2000, 59.94, 4, 64),
    (113, 30.0, 4, 16),
    (112, 30.0, 4, 16),
    (111, 30.0, 4, 16),
    (90, 30.0, 4, 16),
    (60, 12.0, 4, 16),
    (8, 30.0, 4, 16),
    (7, 30.0, 4, 16),
    (6, 30.0, 4, 16),
    (1, 30.0, 4, 16),
    (100, 15.0, 4, 8),
    (40, 4.0, 4, 16),
    (13, 4.0, 4, 16),
    (200, 30.0, 8, 10),
    (77, 17.4, 5, 12),
]
# As in the published configs, but 0.5 for 0.7 in the second: on a grid of 8×8 that leaves a context to every clip.
MASKS = [
    {
        "aspect_ratio": (0.75, 1.5),
        "num_blocks": 8,
        "spatial_scale": (0.15, 0.15),
        "temporal_scale": (1.0, 1.0),
        "max_temporal_keep": 1.0,
    },
    {
        "aspect_ratio": (0.75, 1.5),
        "num_blocks": 2,
        "spatial_scale": (0.5, 0.5),
        "temporal_scale": (1.0, 1.0),
        "max_temporal_keep": 1.0,
    },
]


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of packages that the published files import and none of the code that runs here calls."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in NOT_INSTALLED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__version__ = spec, [], "0.0"
        return module

    def exec_module(self, module: ModuleType) -> None: ...


@torch.no_grad()
def fill(network: nn.Module, prefix: str) -> None:
    """Weights by name, without the published wrappers' prefixes."""
    for name, parameter in network.named_parameters():
        name = f"{prefix}.{canonical(name)}"
        parameter.copy_(torch.from_numpy(inputs.weight(name, tuple(parameter.shape))))


def canonical(name: str) -> str:
    return name.removeprefix("module.").removeprefix("backbone.")


# -- networks ----------------------------------------------------------------------------------------------


@torch.no_grad()
def networks() -> dict[str, Tensor]:
    from src.models.ac_predictor import vit_ac_predictor
    from src.models.attentive_pooler import AttentiveClassifier
    from src.models.vision_transformer import VisionTransformer

    results = {}
    for name, case in inputs.ACTION_CASES.items():
        height, width = case.grid
        predictor = vit_ac_predictor(
            img_size=(16 * height, 16 * width),
            num_frames=2 * case.steps_of_mask,
            embed_dim=inputs.WIDTH,
            predictor_embed_dim=inputs.ACTION_WIDTH,
            depth=inputs.ACTION_DEPTH,
            num_heads=inputs.ACTION_HEADS,
            use_extrinsics=case.extrinsics,
        )
        for block in predictor.predictor_blocks:
            # The network takes its own grid for the pretraining's; its attention can do any.
            block.attn.grid_size = case.pretrained
        fill(predictor, "action_predictor")
        given = [torch.from_numpy(x) for x in inputs.action_inputs(name)]
        results[f"action_predictor.{name}"] = predictor.eval()(*given)  # extrinsics are ignored where it has none

    for depth in inputs.PROBE_DEPTHS:
        probe = AttentiveClassifier(
            embed_dim=inputs.PROBE_WIDTH, num_heads=inputs.PROBE_HEADS, depth=depth, num_classes=inputs.PROBE_CLASSES
        )
        fill(probe, "probe")
        results[f"probe.{depth}"] = probe.eval()(torch.from_numpy(inputs.probe_tokens()))

    encoder = small_encoder(VisionTransformer, img_size=16, patch_size=inputs.PATCH, num_frames=4, use_rope=True)
    fill(encoder, "encoder")
    clips = torch.from_numpy(inputs.values("wide clip", inputs.WIDE_CLIP))
    keep = torch.tensor([[0, 7, 13, 29, 44], [4, 5, 21, 30, 43]])
    results["encoder.all"] = encoder.eval()(clips)
    results["encoder.keep"] = keep
    results["encoder.kept"] = encoder(clips, masks=keep)

    for name, clip in inputs.SINCOS_CASES:
        frames, uniform = inputs.SINCOS_TABLES[name]
        encoder = VisionTransformer(
            img_size=inputs.SINCOS_SIZE,
            patch_size=inputs.SINCOS_PATCH,
            num_frames=frames,
            tubelet_size=inputs.TUBELET,
            embed_dim=inputs.SINCOS_WIDTH,
            depth=0,
            uniform_power=uniform,
        )
        length, height, width = inputs.SINCOS_CLIPS[clip]
        shape = (1, 3, height, width) if frames == 1 else (1, 3, length, height, width)
        table = encoder.interpolate_pos_encoding(torch.empty(shape), encoder.pos_embed)
        results[f"sincos.{name}.{clip}"] = table.clone(memory_format=torch.contiguous_format)
    return results


# -- three steps -------------------------------------------------------------------------------------------


def small_encoder(transformer: type[nn.Module], **arguments: Any) -> nn.Module:
    return transformer(
        embed_dim=inputs.WIDTH,
        depth=inputs.DEPTH,
        num_heads=inputs.HEADS,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **arguments,
    )


def add_small_sizes() -> None:
    """A name for the encoder's sizes, which published configs choose by name."""
    from src.models import vision_transformer

    vision_transformer.vit_small_sizes = partial(small_encoder, vision_transformer.VisionTransformer)


def steps(folder: Path) -> dict[str, Tensor]:
    """Three epochs of one iteration each, so that the published training saves its state after every step."""
    from app.vjepa import train
    from app.vjepa.transforms import _tensor_normalize_inplace

    results: dict[str, Tensor] = {}
    made = {}
    build = train.init_video_model

    def with_weights(**arguments: Any) -> tuple[nn.Module, nn.Module]:
        encoder, predictor = build(**arguments)
        fill(encoder, "encoder")
        fill(predictor, "predictor")
        made.update({"encoder": encoder, "predictor": predictor})
        return encoder, predictor

    def given_clips(*, collator: Any, transform: Any, **_: Any) -> tuple[list[Any], MagicMock]:
        """One batch per step, with masks by the published generators."""
        loader = []
        for step in range(inputs.STEPS):
            clips = [
                _tensor_normalize_inplace(torch.from_numpy(clip), transform.mean, transform.std)
                for clip in inputs.clips(step)
            ]
            ((batch, contexts, targets),) = collator([([clip], 0, [np.arange(inputs.FRAMES)]) for clip in clips])
            for generator, (context, target) in enumerate(zip(contexts, targets, strict=True)):
                results[f"step{step}.context{generator}"] = context.to(torch.int16)
                results[f"step{step}.target{generator}"] = target.to(torch.int16)
            loader.append([(batch, contexts, targets)])
        return Given(loader), MagicMock()

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        step = sum(name.endswith("lr") for name in results)
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        results[f"step{step}.lr"] = torch.tensor(rate, dtype=torch.float64)
        for network, module in made.items():
            for name, parameter in module.named_parameters():
                if parameter.grad is None:
                    continue
                name = f"{network}.{canonical(name)}"
                results[f"step{step}.norm.{name}"] = parameter.grad.double().norm()
                if step == inputs.STEPS - 1:
                    results[f"step{step}.gradient.{name}"] = parameter.grad.clone()

    train.init_video_model, train.init_data = with_weights, given_clips
    hook = register_optimizer_step_pre_hook(note)
    try:
        train.main(
            {
                "folder": str(folder),
                "meta": {"load_checkpoint": False, "dtype": "float32", "use_sdpa": True, "save_every_freq": 1},
                "mask": MASKS,
                "model": {
                    "model_name": "vit_small_sizes",
                    "pred_depth": inputs.PREDICTOR_DEPTH,
                    "pred_num_heads": inputs.PREDICTOR_HEADS,
                    "pred_embed_dim": inputs.PREDICTOR_WIDTH,
                    "uniform_power": True,
                    "use_mask_tokens": True,
                    "zero_init_mask_tokens": True,
                    "use_rope": True,
                },
                "data": {
                    "dataset_fpcs": [inputs.FRAMES],
                    "batch_size": inputs.CLIPS,
                    "tubelet_size": inputs.TUBELET,
                    "crop_size": inputs.SIZE,
                    "patch_size": inputs.PATCH,
                },
                "data_aug": {},
                "loss": {"loss_exp": 1.0},
                "optimization": {
                    "ipe": 1,
                    "ipe_scale": 1.0,
                    "weight_decay": inputs.WEIGHT_DECAY,
                    "final_weight_decay": inputs.WEIGHT_DECAY,
                    "epochs": inputs.STEPS,
                    "warmup": 2,
                    "start_lr": inputs.START_LR,
                    "lr": inputs.PEAK_LR,
                    "final_lr": inputs.FINAL_LR,
                    "ema": [inputs.MOMENTUM, inputs.MOMENTUM],
                    "eps": inputs.ADAM_EPS,
                },
            }
        )
    finally:
        hook.remove()
    for step in range(inputs.STEPS):
        loss = torch.load(folder / f"e{step}.pt", weights_only=True)["loss"]
        results[f"step{step}.loss"] = torch.tensor(loss, dtype=torch.float64)
    return results


class Given(list[Any]):
    """A loader that goes on where it was left."""

    def __iter__(self) -> Iterator[Any]:
        return iter([self.pop(0) for _ in range(len(self))])


def strides() -> list[dict[str, Any]]:
    """What ``VideoDataset`` takes of videos that have so many frames at such a rate.

    offset: the place of the window, of ``places``: the published code draws it uniformly; null where it draws none
    """
    from src.datasets import video_dataset

    rows = []
    for source_frames, source_fps, fps, frames in STRIDES:
        reader = MagicMock()
        reader.__len__.return_value = source_frames
        reader.get_avg_fps.return_value = source_fps
        for share in (0.0, 0.37, 0.9999):
            drawn = []

            def randint(low: int, high: int, share: float = share, drawn: list[Any] = drawn) -> int:
                drawn.extend([int(share * (high - low)), high - low])
                return low + drawn[0]

            dataset = video_dataset.VideoDataset([], frames_per_clip=frames, frame_step=None, fps=fps)
            with (
                patch.object(video_dataset, "VideoReader", lambda *_, reader=reader, **__: reader),
                patch.object(video_dataset.np.random, "randint", randint),
            ):
                _, (numbers,) = dataset.loadvideo_decord(__file__, frames)
            offset, places = drawn or (None, None)
            rows.append(
                {
                    "source_frames": source_frames,
                    "source_fps": source_fps,
                    "fps": fps,
                    "frames": frames,
                    "offset": offset,
                    "places": places,
                    "numbers": numbers.tolist(),
                }
            )
            if not drawn:
                break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, help="a checkout of facebookresearch/vjepa2")
    sys.path.insert(0, str(parser.parse_args().published.resolve()))
    sys.meta_path.append(StandIns())  # last: what is installed is used
    torch.set_num_threads(1)
    rows = ",\n".join(json.dumps(row) for row in strides())
    (HERE / "strides.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    for name, results in (("poses", poses()), ("plans", plans())):
        (HERE / f"{name}.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    save_file(networks(), HERE / "networks.safetensors", metadata=METADATA)
    for variable in ("SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_NTASKS"):
        os.environ.pop(variable, None)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        add_small_sizes()
        three_steps, of_actions = steps(Path(folder)), action_steps(Path(folder))
        dist.destroy_process_group()
        shutil.copyfile(Path(folder) / "latest.pt", HERE / "checkpoint.pt")
    for name, results in (("steps", three_steps), ("action_steps", of_actions)):
        save_file({key: value.contiguous() for key, value in results.items()}, HERE / f"{name}.safetensors", METADATA)


if __name__ == "__main__":
    main()
