"""Small action-conditioned models: checkpoints of the action stage, and published files of them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.formats_material import SMALL, model, random_tensors
from tests.published import inputs
from vjepa_scale.checkpoint import store
from vjepa_scale.model.predictor import ActionPredictor
from vjepa_scale.recipe.schema import ModelConfig, Recipe

PUBLISHED = Path(__file__).parents[1] / "published"

ACTION = SMALL | {"action_predictor": {"width": 40, "depth": 2, "heads": 2, "mlp_hidden": 96, "grid": [4, 4]}}


def action_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """What the action stage saves: the frozen encoder and action_predictor.*, all different."""
    drawn = random_tensors(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    predictor = ActionPredictor(config.action_predictor, encoder_width=config.encoder.width).state_dict()
    out = {name: value for name, value in drawn.items() if name.startswith("encoder.")}
    for name, value in predictor.items():
        scale = 0.7 / value.shape[-1] ** 0.5 if value.ndim > 1 else 0.1
        out[f"action_predictor.{name}"] = torch.randn(value.shape, generator=generator) * scale
    return out


def save_stage(
    run: Path,
    stage: str,
    tensors: dict[str, Tensor],
    *,
    tree: dict[str, Any] = ACTION,
    size: tuple[int, int] = (32, 32),
    step: int = 4,
) -> dict[str, Tensor]:
    """A checkpoint of any stage in a run folder; returns its tensors."""
    recipe = Recipe.model_validate(
        {
            "run": {"dir": str(run)},
            "data": {"sets": {"a": {"path": "data/a"}}, "augment": {"mean": [0.1, 0.2, 0.3]}},
            "model": tree,
            "masks": {"group": 4},
            "pretrain": {
                "steps": 4,
                "global_batch": 4,
                "micro_batch": 4,
                "phases": [{"name": "all", "start_lr": 1e-3}],
            },
        }
    )
    manifest = {
        "stage": stage,
        "phase": "all",
        "frames": 8,
        "size": list(size),
        "fps": 4.0,
        "drawn": {"a": 16},
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
    }
    store.save(run / stage / "checkpoints", step, tensors, manifest)
    return tensors


def action_run(folder: Path, *, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """A run with an action stage, and nothing else; returns its tensors."""
    return save_stage(folder, "action", action_tensors(model(options.get("tree", ACTION)), seed), **options)


def published_action_dict() -> dict[str, Any]:
    """What the published action-conditioned training saves, by the names and shapes in action_file.json.

    Weights by name, as for tests/published.
    """
    out: dict[str, Any] = {"opt": None, "scaler": None, "epoch": 3, "loss": 0.5, "batch_size": 8, "world_size": 32}
    for network, shapes in json.loads((PUBLISHED / "action_file.json").read_text()).items():
        ours = {"encoder": "encoder", "predictor": "action_predictor"}[network]
        out[network] = {
            name: torch.from_numpy(inputs.weight(f"{ours}.{name.removeprefix('module.')}", tuple(shape)))
            for name, shape in shapes.items()
        }
    return out | {"target_encoder": out["encoder"], "lr": 4.25e-4}
