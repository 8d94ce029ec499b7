"""Runs the published action-conditioned model: what its file holds, and what it imagines of a picture.

    python -m tests.published.make_action_file PUBLISHED        # from the repository's root; see make.py

    action_file.json           encoder and predictor of a file that its training saves: name → shape, in order
    action_rollout.safetensors tokens of a picture, and what two actions make of them, with the poses that are reached,
                               by the world model of its notebooks

Weights and inputs are drawn by name (inputs.py), so that names and shapes are all that is needed to write such a file.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.published import inputs
from tests.published.action_inputs import CASE, MEAN, SIDE, STD, actions, picture, start

HERE = Path(__file__).parent


def networks() -> dict[str, Any]:
    """Encoder and predictor, with weights by name. Needs a process group."""
    from app.vjepa_droid.utils import init_video_model
    from src.models import vision_transformer

    from tests.published.make import fill, small_encoder

    vision_transformer.vit_small_sizes = partial(small_encoder, vision_transformer.VisionTransformer)
    encoder, predictor = init_video_model(
        device="cpu",
        model_name="vit_small_sizes",
        patch_size=inputs.PATCH,
        crop_size=SIDE,
        max_num_frames=2 * CASE.steps_of_mask,
        tubelet_size=inputs.TUBELET,
        pred_depth=inputs.ACTION_DEPTH,
        pred_num_heads=inputs.ACTION_HEADS,
        pred_embed_dim=inputs.ACTION_WIDTH,
        uniform_power=True,
        use_sdpa=True,
        use_rope=True,
    )
    fill(encoder, "encoder")
    fill(predictor, "action_predictor")
    return {"encoder": encoder.eval(), "predictor": predictor.eval()}


def action_file(made: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    return {
        name: {key: list(value.shape) for key, value in DistributedDataParallel(network).state_dict().items()}
        for name, network in made.items()
    }


@torch.no_grad()
def action_rollout(made: dict[str, Any]) -> dict[str, Tensor]:
    from notebooks.utils import world_model_wrapper

    mean, std = (torch.tensor(value) for value in (MEAN, STD))

    def transform(clip: np.ndarray) -> Tensor:
        return ((torch.from_numpy(clip).float() / 255 - mean) / std).permute(3, 0, 1, 2)

    world = world_model_wrapper.WorldModel(
        tokens_per_frame=CASE.grid[0] * CASE.grid[1], transform=transform, device="cpu", **made
    )
    tokens = world.encode(picture())
    with patch.object(world_model_wrapper, "cem") as planner:
        world.infer_next_action(tokens, None, None)
    step = planner.call_args.kwargs["world_model"]
    frames, poses, taken = tokens[:, None], torch.from_numpy(start())[None, None], torch.from_numpy(actions())[None]
    for number in range(1, taken.shape[1] + 1):
        frame, pose = step(frames, taken[:, :number], poses)
        frames, poses = torch.cat([frames, frame], dim=1), torch.cat([poses, pose], dim=1)
    return {"tokens": tokens, "imagined": frames[:, 1:].contiguous(), "states": poses}


def main() -> None:
    from tests.published.make import METADATA, StandIns

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, help="a checkout of facebookresearch/vjepa2")
    sys.path.insert(0, str(parser.parse_args().published.resolve()))
    sys.meta_path.append(StandIns())  # last: what is installed is used
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = networks()
    lines = [
        f'"{network}": {{\n' + ",\n".join(f"{json.dumps(name)}: {shape}" for name, shape in shapes.items()) + "\n}"
        for network, shapes in action_file(made).items()
    ]
    (HERE / "action_file.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    save_file(action_rollout(made), HERE / "action_rollout.safetensors", METADATA)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
