"""Ranks that cannot share a batch: the refusal names numbers of nodes and clips that work, and they do."""

import re

import pytest

from tests.chain import ROOT
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe import Recipe, load_recipe, stages_of
from vjepa_scale.recipe.rank_counts import refuse_uneven_batches

# 16 nodes × 8. Batches: pretrain 3072 = 128 × 24, cooldown 3072 = 1536 × 2; action, on 4 nodes, 256 = 32 × 8.
FLAGSHIP = ROOT / "recipes" / "vitg_384.yaml"
ONE_GPU = ROOT / "recipes" / "vitl_1gpu.yaml"  # 384 = 16 × 24, 384 = 64 × 6
OWN = "pretrain.phases.1.micro_batch"

CASES = [
    # Pretraining and cooldown have their nodes from one key; 12 nodes are nearer to 14 than 8, with smaller parts.
    (["launch.nodes=14"], ["launch.nodes=8", "launch.nodes=16", "launch.nodes=12 pretrain.micro_batch=8"]),
    # Only pretraining does not divide.
    (["launch.nodes=12"], ["pretrain.launch.nodes=8", "pretrain.launch.nodes=16", "pretrain.micro_batch=8"]),
    (["action.launch.nodes=3"], ["action.launch.nodes=2", "action.launch.nodes=4"]),
    (["action.launch.nodes=5", "action.launch.tasks_per_node=1"], ["action.launch.nodes=4", "action.launch.nodes=8"]),
    (["action.launch.nodes=16"], ["action.launch.nodes=4", "action.micro_batch=2"]),
    # A phase that has micro-batches of its own.
    (
        ["launch.nodes=12", f"{OWN}=12", "cooldown=null", "action=null"],
        ["launch.nodes=8", "launch.nodes=16", f"pretrain.micro_batch=8 {OWN}=8"],
    ),
    # Phases of other batches, 128 and 72 micro-batches: the numbers are for both.
    (
        ["launch.nodes=9", "pretrain.phases.1.global_batch=1728", "cooldown=null", "action=null"],
        ["launch.nodes=1", "launch.nodes=8 pretrain.micro_batch=3"],
    ),
    # Copies of the weights: 8 ranks do not make 16.
    (
        ["launch.nodes=3", "launch.tasks_per_node=8", "engine.replicate=16"],
        ["pretrain.launch.nodes=2", "pretrain.launch.nodes=4"],
    ),
    (["pretrain.global_batch=24", "cooldown=null", "action=null"], ["launch.nodes=3 pretrain.micro_batch=1"]),
    (
        ["pretrain.global_batch=24", "cooldown=null", "action=null", "launch.tasks_per_node=64"],
        ["a global_batch that is a multiple of micro_batch × ranks = 24576"],
    ),
]


def refusal(recipe: Recipe) -> str | None:
    try:
        refuse_uneven_batches(list(stages_of(recipe).values()))
    except UserError as error:
        return error.fix
    return None


def shares(recipe: Recipe) -> bool:
    """By the recipe's keys alone."""
    for name in recipe.stages():
        config = recipe.stages()[name]
        launch = recipe.launch.model_dump() | (config.launch.model_dump(exclude_none=True) if config.launch else {})
        for phase in config.phases:
            clips = (phase.micro_batch or config.micro_batch) * launch["nodes"] * launch["tasks_per_node"]
            if (phase.global_batch or config.global_batch) % clips:
                return False
    return True


@pytest.mark.parametrize(("overrides", "remedies"), CASES)
def test_the_refusal_names_numbers_that_work(overrides: list[str], remedies: list[str]) -> None:
    recipe = load_recipe(FLAGSHIP, overrides)
    assert not shares(recipe)
    fix = refusal(recipe)
    assert fix is not None
    found = []
    for part in fix.split("; or "):
        key = part.partition("=")[0]
        found += [word if "=" in word else f"{key}={word}" for word in re.split(r" or (?=\d)", part)]
    assert found == remedies
    for remedy in found:
        if not remedy.startswith("a global_batch"):
            assert shares(load_recipe(FLAGSHIP, [*overrides, *remedy.split()])), remedy


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16])
def test_what_divides_is_not_refused(nodes: int) -> None:
    assert refusal(load_recipe(FLAGSHIP, [f"launch.nodes={nodes}"])) is None


def test_on_one_node_the_number_is_of_processes() -> None:
    words = "launch.tasks_per_node=4 or 8; or launch.tasks_per_node=6 pretrain.micro_batch=8 cooldown.micro_batch=4"
    assert refusal(load_recipe(ONE_GPU, ["launch.tasks_per_node=7"])) == words


def test_each_phase_that_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match=r"which 112 ranks cannot .*; nor .*cooldown \(decay\)") as caught:
        refuse_uneven_batches(list(stages_of(load_recipe(FLAGSHIP, ["launch.nodes=14"])).values()))
    assert caught.value.where == "pretrain.global_batch"
