"""What a plan says of memory and time, against engines that were really built and values worked out by hand."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.model.test_memory import small
from tests.processes import run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MicroBatch, draw_masks
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.launch.estimate import (
    GPUS,
    UTILISATION,
    estimate,
    estimate_lines,
    fits,
    in_words,
    recipes_table,
    state_bytes,
)
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import Recipe, Stage, load_recipe, stages_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def on(ranks: int, **engine: object) -> Stage:
    recipe = small(**engine)
    launch = recipe.launch.model_copy(update={"tasks_per_node": ranks})
    return stages_of(recipe.model_copy(update={"launch": launch}))["pretrain"]


def size(tensors: Iterable[Tensor]) -> int:
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in locals_)


FSDP = [({}, 1), ({}, 2), ({"replicate": "all"}, 1)]  # options of the engine, micro-batches that are accumulated


def held_by_fsdp(ranks: Ranks) -> list[dict[str, int]]:
    return [
        _held_by_fsdp(ranks, on(ranks.world_size, precision="float32", **o), accumulated) for o, accumulated in FSDP
    ]


def _held_by_fsdp(ranks: Ranks, stage: Stage, accumulated: int) -> dict[str, int]:
    engine = build_engine(stage.recipe.engine, ranks)
    objective = Jepa(stage, engine)
    engine.start_optimizer(stage.optimizer, objective.trained)
    masks = draw_masks(stage.recipe.masks, seed=0, step=0, slots=range(2), grid=(4, 8, 8))
    batch = MicroBatch(torch.zeros(2, 3, 8, 64, 64, dtype=torch.uint8), masks, 0, range(2), ("a", "a"))
    engine.backward(lambda: objective.loss(batch)["loss"], share=1.0, last=accumulated == 1)
    trained = [parameter for network in objective.trained.values() for parameter in network.parameters()]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if accumulated > 1:  # PyTorch says nowhere in public where a rank's own sum is
        gradients = [
            parameter._unsharded_param.grad
            for network in objective.trained.values()
            for module in network.modules()
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None
            for parameter in group.fsdp_params
            if parameter._unsharded_param.grad is not None
        ]
    state = engine.tensors(objective.networks, optimizer=True)
    return {
        "weights": size(trained),
        "target or frozen encoder": size(objective.target_encoder.parameters()),
        "gradients": size(gradients),
        "optimiser": size(tensor for name, tensor in state.items() if name.startswith("optimizer.")),
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_state_under_fsdp() -> None:
    """Sharded over two ranks; with a rank's own sum of gradients between micro-batches; replicated."""
    for cases in run_processes(held_by_fsdp, 2):
        for (options, accumulated), found in zip(FSDP, cases, strict=True):
            computed = state_bytes(on(2, precision="float32", **options), accumulated=accumulated)
            for part, held in found.items():
                assert computed[part] == pytest.approx(held, rel=0.01), (options, accumulated, part)


def held_by_zero(ranks: Ranks, level: int) -> dict[str, int]:
    from vjepa_scale.distributed.zero import ZeroEngine

    stage = on(ranks.world_size, precision="float32", kind="deepspeed", zero_stage=level)
    engine = build_engine(stage.recipe.engine, ranks)
    assert isinstance(engine, ZeroEngine)
    objective = Jepa(stage, engine)
    engine.start_optimizer(stage.optimizer, objective.trained)
    trained = [parameter for network in objective.trained.values() for parameter in network.parameters()]
    masters = engine._zero.fp32_partitioned_groups_flat if level == 3 else engine._zero.single_partition_of_fp32_groups
    moments = [state[name] for state in engine._optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": size(engine._local(parameter) for parameter in trained) + size(masters),
        "target or frozen encoder": size(engine._local(p) for p in objective.target_encoder.parameters()),
        "optimiser": size(moments),
    }


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2, 3])
def test_state_under_zero(level: int) -> None:
    computed = state_bytes(on(2, precision="float32", kind="deepspeed", zero_stage=level), accumulated=1)
    for found in run_processes(held_by_zero, 2, level):
        for part, held in found.items():
            assert computed[part] == pytest.approx(held, rel=0.01), part


def test_state_of_vit_g_on_one_node_by_hand() -> None:
    """1,012,174,592 weights of the encoder and 22,082,432 of the predictor, over 8 ranks."""
    recipe = load_recipe(RECIPES[0].with_name("vitg_256.yaml"), ["launch.nodes=1"])
    encoder, both = 1_012_174_592, 1_012_174_592 + 22_082_432
    found = state_bytes(stages_of(recipe)["pretrain"], accumulated=16)
    assert found["weights"] == pytest.approx(4 * both / 8, rel=1e-3)
    assert found["target or frozen encoder"] == pytest.approx(4 * encoder / 8, rel=1e-3)
    assert found["optimiser"] == pytest.approx(8 * both / 8, rel=1e-3)
    assert found["gradients"] == pytest.approx(4 * both, rel=1e-3)  # a rank's own sum, unsharded


def test_time_is_flops_over_what_the_gpus_reach() -> None:
    """1e18 FLOPs on two GPUs of 989e12 FLOP/s, of which 30 % are reached: 1,685 s a step."""
    stage = on(2)
    phase = replace(stage.phases[0], global_batch=4)
    stage.step_flops = lambda _: 1e18  # type: ignore[method-assign]
    found = estimate(stage, phase)
    assert found is not None
    assert found.step_s == pytest.approx(1685.2, rel=1e-4)
    assert UTILISATION == 0.3
    assert found.gpu_hours == pytest.approx(2 * 2 * found.step_s / 3600)  # two steps
    assert found.days == pytest.approx(2 * found.step_s / 86400)
    (_, time) = estimate_lines(stage, phase)
    assert time.startswith("time: 1.69e+03 s a step")


def test_recomputation_takes_a_third_more_of_what_is_trained() -> None:
    """The forward pass again, of three: less the target encoder, which is not trained, and the patch embedding."""
    (plain, again) = (on(1, activation_checkpointing=how) for how in ("none", "full"))
    without, with_it = (estimate(stage, stage.phases[0]) for stage in (plain, again))
    assert without is not None
    assert with_it is not None
    assert 1.1 < with_it.flops / without.flops < 4 / 3
    assert with_it.memory["activations"] < without.memory["activations"] / 4


@pytest.mark.parametrize(("precision", "said"), [("float32", "no estimate in float32"), ("bfloat16", "GPU-hours")])
def test_no_time_where_the_peak_is_of_another_type(precision: str, said: str) -> None:
    stage = on(1, precision=precision)
    assert said in list(estimate_lines(stage, stage.phases[0]))[1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_fits_its_gpu(path: Path) -> None:
    recipe = load_recipe(path)
    estimated = 0
    for stage in stages_of(recipe).values():
        for phase in stage.phases:
            if (found := estimate(stage, phase)) is not None:
                estimated += 1
                assert fits(found, recipe), f"{stage.name} {phase.name}: {found.memory}"
    assert estimated or path.stem == "probe_ssv2"


@pytest.mark.parametrize("name", ["vitb_1gpu", "vitl_1gpu", "vitl_1node", "continue_published_1node"])
def test_headers_of_recipes_say_what_is_computed(name: str) -> None:
    path = RECIPES[0].with_name(f"{name}.yaml")
    said = f"# Computed, not measured: {in_words(load_recipe(path))}."
    assert said in path.read_text().splitlines()


def test_the_table_of_recipes_is_up_to_date() -> None:
    page = (RECIPES[0].parents[1] / "docs" / "recipes.md").read_text()
    assert recipes_table(RECIPES[0].parent) in page, "run: python -m vjepa_scale.launch.estimate"


def test_what_does_not_fit_is_said() -> None:
    recipe: Recipe = load_recipe(RECIPES[0].with_name("vitg_256.yaml"), ["launch.gpu=RTX4090"])
    stage = stages_of(recipe)["pretrain"]
    memory, _ = estimate_lines(stage, stage.phases[0])
    assert "MORE THAN FITS: 90% of 24 GB" in memory
    assert "computed, not measured" in memory


def test_every_gpu_of_the_schema_is_known() -> None:
    from typing import get_args

    from vjepa_scale.recipe.schema import LaunchConfig

    assert set(get_args(LaunchConfig.model_fields["gpu"].annotation)) == GPUS.keys()
    assert all(math.isfinite(gpu.peak) for gpu in GPUS.values())
