"""Bytes kept for the backward pass, by formula, against the storages that autograd and checkpointing really keep."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vjepa_scale.data.batch import MicroBatch, draw_masks
from vjepa_scale.distributed.prepare_blocks import prepare_blocks
from vjepa_scale.model.memory import FLOAT32, activation_bytes, clip_bytes, compute_bytes
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import Recipe, stages_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.recipe.schema import EngineConfig

CLIPS, FRAMES, SIDE = 2, 8, 64


class Unsharded:
    """What an objective asks of an engine, on plain networks: as FSDP2 computes, blocks have one compute type."""

    def __init__(self, cfg: EngineConfig) -> None:
        self._cfg, self.device = cfg, torch.device("cpu")
        self._type = torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32

    def shard(self, network: nn.Module, *, name: str, seed: int, trainable: bool) -> nn.Module:
        prepare_blocks(network, self._cfg, trainable=trainable)
        network.to_empty(device="cpu").to(self._type).requires_grad_(trainable)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, 0.02)

        def cast(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(x.to(self._type) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)

        network.register_forward_pre_hook(cast)
        network.register_forward_hook(lambda _, __, out: out.float())
        return network

    def match_ema(self, *_: object) -> None: ...

    def set_forward_order(self, _: object) -> None: ...


def storages(tensors: list[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def alive() -> list[Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]


def small(**engine: object) -> Recipe:
    return validate_recipe(
        {
            "run": {"dir": "runs/x"},
            "engine": {"device": "cpu", **engine},
            "data": {"sets": {"a": {"path": "a"}}},
            "model": {
                "encoder": {"width": 192, "depth": 6, "heads": 3},
                "predictor": {"width": 96, "depth": 4, "heads": 3},
                "patch": 8,
            },
            "masks": {"group": 2},
            "pretrain": {
                "steps": 2,
                "clip": {"frames": FRAMES, "size": SIDE},
                "global_batch": CLIPS,
                "micro_batch": CLIPS,
                "phases": [{"name": "all", "start_lr": 1e-3}],
            },
        },
        source="test",
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_what_a_micro_batch_keeps(precision: str, checkpointing: str) -> None:
    recipe = small(precision=precision, activation_checkpointing=checkpointing)
    stage = stages_of(recipe)["pretrain"]
    objective = Jepa(stage, Unsharded(recipe.engine))  # type: ignore[arg-type]
    (phase,) = stage.phases
    work = stage.clip_work(phase, FRAMES)
    assert work is not None
    # The step of the largest masks, which the formula is of.
    grid = (FRAMES // 2, SIDE // 8, SIDE // 8)
    drawn = [draw_masks(recipe.masks, seed=0, step=step, slots=range(CLIPS), grid=grid) for step in range(32)]
    masks = max(drawn, key=lambda pairs: sum(pair.context.shape[1] for pair in pairs))
    clips = torch.zeros(CLIPS, 3, FRAMES, SIDE, SIDE, dtype=torch.uint8)
    batch = MicroBatch(clips, masks, 0, range(CLIPS), ("a",) * CLIPS)

    before = storages(alive())
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.loss(batch)["loss"]
    found = sum(size for where, size in storages([*kept, *alive()]).items() if where not in before)
    assert loss.requires_grad

    # What the formula counts until the loss is there, and has gone now: all target features, twice.
    gone = 2 * FLOAT32 * grid[0] * grid[1] * grid[2] * recipe.model.encoder.width
    computed = CLIPS * (activation_bytes(recipe.model, work, recipe.engine) - gone)
    assert computed == pytest.approx(found, rel=0.15)


def test_a_clip_on_the_gpu() -> None:
    recipe = small(precision="bfloat16")
    stage = stages_of(recipe)["pretrain"]
    work = stage.clip_work(stage.phases[0], FRAMES)
    assert work is not None
    clip = torch.zeros(3, FRAMES, SIDE, SIDE)
    every = [clip.byte(), clip, clip.bfloat16()]
    assert clip_bytes(work, recipe.engine) == sum(storages(every).values())
    assert compute_bytes(recipe.engine) == clip.bfloat16().element_size()
