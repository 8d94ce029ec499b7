"""Three steps of the published training of action-conditioned predictors. Run by make.py.

``app.vjepa_droid.train.main`` runs as it is, its ``load_pretrained`` too, from a file with weights by name. A loader
with given clips and states is put in place of the data set; their actions are the published data set's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.published import inputs


def action_steps(folder: Path) -> dict[str, Tensor]:
    """Per run of inputs.py and step: loss, its two parts, learning rate, gradients' norms; gradients of the last step
    and the predictor at the end."""
    found = {}
    for name in inputs.ACTION_RUNS:
        results = _run(name, folder / name)
        found |= {f"{name}.{key}": value for key, value in results.items()}
    return found


def _run(name: str, folder: Path) -> dict[str, Tensor]:
    """One epoch per step, so that the schedule's three parts are a step each."""
    from app.vjepa_droid import train

    folder.mkdir()
    results: dict[str, Tensor] = {}
    made: dict[str, nn.Module] = {}
    build, timer = train.init_video_model, train.gpu_timer

    def with_weights(**arguments: Any) -> tuple[nn.Module, nn.Module]:
        made["encoder"], made["predictor"] = build(**arguments)
        pretrained = {"target_encoder": _drawn(made["encoder"], "encoder", "module.backbone.")}
        predictor = _drawn(made["predictor"], "action_predictor", "module.")
        torch.save({"epoch": 0, "predictor": predictor, **pretrained}, folder / "pretrained.pt")
        return made["encoder"], made["predictor"]

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        step = sum(key.endswith(".lr") for key in results)
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        results[f"step{step}.lr"] = torch.tensor(rate, dtype=torch.float64)
        assert all(parameter.grad is None for parameter in made["encoder"].parameters())
        if step == 0:
            _check_drawn(made["predictor"].state_dict(), "action_predictor")
        for key, parameter in made["predictor"].named_parameters():
            if parameter.grad is None:  # extrinsics that are not used
                continue
            results[f"step{step}.norm.{key}"] = parameter.grad.double().norm()
            if step == inputs.STEPS - 1:
                results[f"step{step}.gradient.{key}"] = parameter.grad.clone()

    def timed(train_step: Callable[[], tuple[float, ...]]) -> Any:
        """The step's own timer, the only place where both parts of the loss are given with all digits."""
        found = timer(train_step)
        step = sum(key.endswith(".loss") for key in results)
        for key, value in zip(("loss", "teacher_loss", "rollout_loss"), found[0][:3], strict=True):
            results[f"step{step}.{key}"] = torch.tensor(value, dtype=torch.float64)
        return found

    hook = register_optimizer_step_pre_hook(note)
    try:
        with (
            patch.object(train, "init_video_model", with_weights),
            patch.object(train, "init_data", _given_clips),
            patch.object(train, "gpu_timer", timed),
        ):
            train.main(_config(inputs.ACTION_RUNS[name], folder))
    finally:
        hook.remove()
    saved = torch.load(folder / "latest.pt", weights_only=True)
    for network in ("encoder", "target_encoder"):
        _check_drawn({key.removeprefix("module."): value for key, value in saved[network].items()}, "encoder")
    final = {key.removeprefix("module."): value for key, value in saved["predictor"].items()}
    return results | {f"final.{key}": value for key, value in final.items()}


def _drawn(network: nn.Module, prefix: str, wrappers: str) -> dict[str, Tensor]:
    """Weights by name, as a checkpoint of wrapped networks holds them."""
    return {
        f"{wrappers}{key}": torch.from_numpy(inputs.weight(f"{prefix}.{key}", tuple(value.shape)))
        for key, value in network.state_dict().items()
    }


def _check_drawn(weights: dict[str, Tensor], prefix: str) -> None:
    """These are the ones to start from, all of them: the published loading takes what fits and goes on."""
    for key, value in weights.items():
        assert torch.equal(value, torch.from_numpy(inputs.weight(f"{prefix}.{key}", tuple(value.shape)))), key


def _given_clips(*, collator: Any, transform: Any, **_: Any) -> tuple[list[Any], MagicMock]:
    """One batch per step: what ``DROIDVideoDataset`` gives of each clip, collated."""
    from app.vjepa_droid.droid import DROIDVideoDataset
    from app.vjepa_droid.transforms import _tensor_normalize_inplace

    loader = []
    for step in range(inputs.STEPS):
        rows = []
        arrays = (inputs.action_clips(step), inputs.action_states(step), inputs.action_cameras(step))
        for clip, states, cameras in zip(*arrays, strict=True):
            pixels = _tensor_normalize_inplace(torch.from_numpy(clip), transform.mean, transform.std)
            actions = DROIDVideoDataset.poses_to_diffs(None, states)
            rows.append((pixels, actions, states, cameras, list(range(inputs.ACTION_FRAMES))))
        loader.append(collator(rows))
    return loader, MagicMock()


def _config(run: inputs.ActionRun, folder: Path) -> dict[str, Any]:
    """As the published one, but for sizes, rates and float32."""
    return {
        "folder": str(folder),
        "meta": {
            "dtype": "float32",
            "use_sdpa": True,
            "load_predictor": True,  # published: False, from random weights
            "pretrain_checkpoint": str(folder / "pretrained.pt"),
            "context_encoder_key": "target_encoder",
            "target_encoder_key": "target_encoder",
        },
        "model": {
            "model_name": "vit_small_sizes",
            "pred_depth": inputs.ACTION_DEPTH,
            "pred_num_heads": inputs.ACTION_HEADS,
            "pred_embed_dim": inputs.ACTION_WIDTH,
            "pred_is_frame_causal": True,
            "uniform_power": True,
            "use_rope": True,
            "use_extrinsics": run.extrinsics,
        },
        "data": {
            "datasets": ["given"],
            "dataset_fpcs": [inputs.ACTION_FRAMES],
            "batch_size": inputs.CLIPS,
            "tubelet_size": inputs.TUBELET,
            "fps": 4,
            "crop_size": inputs.ACTION_SIZE,
            "patch_size": inputs.PATCH,
        },
        "data_aug": {},
        "loss": {"loss_exp": run.exponent, "normalize_reps": True, "auto_steps": run.rollout_steps},
        "optimization": {
            "ipe": 1,
            "weight_decay": inputs.WEIGHT_DECAY,
            "final_weight_decay": inputs.WEIGHT_DECAY,
            "epochs": inputs.STEPS,
            "warmup": 2,
            "anneal": 1,
            "start_lr": inputs.START_LR,
            "lr": inputs.PEAK_LR,
            "final_lr": inputs.FINAL_LR,
            "eps": inputs.ADAM_EPS,
        },
    }
