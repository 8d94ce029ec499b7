"""The real recipes under both engines at their real number of ranks, 128, of which one is here.

PyTorch's fake process group stands for the others: it communicates nothing, so numbers mean nothing, and shapes,
placements and hooks are what they will be.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.chain import tool
from tests.processes import run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed.engine import Engine, build_engine
from vjepa_scale.distributed.optim import named_parameters
from vjepa_scale.distributed.prepare_blocks import blocks_of
from vjepa_scale.launch.plan import chosen_stages, describe
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
REAL = ("vitl_256", "vith_256", "vitg_256", "vitg_384", "vjepa1_vitl", "ijepa_vith", "continue_published")
# What a shared recipe would be run with on top of its own options.
OPTIONS = ("engine.activation_checkpointing=full", "engine.prefetch=2")
SHALLOW = ("model.encoder.depth=1", "model.predictor.depth=1")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_a_real_recipe_has_a_plan_under_either_engine(name: str, engine: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml", [f"engine.kind={engine}", "engine.zero_stage=2"])
    plan = "\n".join(describe(chosen_stages(recipe, None), where="slurm"))
    assert f"16 nodes × 8 = 128, {engine}, bfloat16, on cuda" in plan


def test_a_real_recipe_passes_a_dry_run_under_zero() -> None:
    """As a user asks for it. tests/launch does the same under FSDP2."""
    options = ("engine.kind=deepspeed", "engine.zero_stage=2", "--cluster", "local")
    plan = tool("launch", RECIPES / "vitg_384.yaml", "--dry-run", *options, check=False).stdout
    assert "128, deepspeed, bfloat16, on cuda" in plan
    refused = [line for line in plan.splitlines() if line.startswith("refused now")]
    # For the data, which are not here; not for anything in the recipe.
    assert all("no such data folder" in line for line in refused), refused


# -- 128 ranks -----------------------------------------------------------------------------------------


def zeros(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    return torch.zeros(shape)


def no_bytes(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """Any shape in four bytes: ViT-g whole takes 4 GB."""
    return torch.zeros(()).expand(shape)


@contextmanager
def one_of_many(rank: int, world_size: int) -> Iterator[Ranks]:
    """This process as one rank of a group whose other ranks are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    yield Ranks(rank, world_size, rank % 8, 8, "test", "submitit-local", "test")


def networks_of(recipe: Recipe) -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            "encoder": Encoder(recipe.model),
            "predictor": Predictor(recipe.model),
            "target_encoder": Encoder(recipe.model),
        }


def shard_all(engine: Engine, networks: dict[str, nn.Module], value: object) -> None:
    for name, network in networks.items():
        trainable = name != "target_encoder"
        start = name.removeprefix("target_")
        engine.shard(network, name=start, seed=0, trainable=trainable, initial_value=value)  # type: ignore[arg-type]
    engine.match_ema(networks["target_encoder"], networks["encoder"])


# Recipe, rank of 128, and what is asked for on top of the recipe.
SHARDED: list[tuple[str, int, tuple[str, ...]]] = [
    ("vitg_384", 0, ()),
    ("vitl_256", 9, ("engine.replicate=1", "engine.activation_checkpointing=selective")),
    ("vjepa1_vitl", 127, ("engine.replicate=all",)),
]


def _shard_with_fsdp(_: Ranks) -> None:
    for name, rank, options in SHARDED:
        recipe = load_recipe(RECIPES / f"{name}.yaml", ["engine.device=cpu", *OPTIONS, *options])
        world_size = recipe.launch.nodes * recipe.launch.tasks_per_node
        with one_of_many(rank, world_size) as ranks:
            networks = networks_of(recipe)
            whole = {key: p.shape for key, p in named_parameters(networks)}
            shard_all(build_engine(recipe.engine, ranks), networks, no_bytes)
            assert [len(blocks_of(network)) for network in networks.values()] == [
                recipe.model.encoder.depth,
                recipe.model.predictor.depth,
                recipe.model.encoder.depth,
            ]
            for block in [block for network in networks.values() for block in blocks_of(network)]:
                assert isinstance(block, torch.distributed.fsdp.FSDPModule)
                assert "forward" in vars(block)  # compiled, and checkpointed where it is trained
            shards = {"auto": 8, 1: world_size, "all": 1}[recipe.engine.replicate]
            sharded = named_parameters(networks)
            assert {key for key, _ in sharded} == whole.keys()
            for key, parameter in sharded:
                assert isinstance(parameter, DTensor)
                assert parameter.shape == whole[key]
                # As PyTorch cuts a plain tensor; the pieces of all ranks make up the whole.
                pieces = torch.empty(whole[key], device="meta").chunk(shards)
                assert sum(piece.numel() for piece in pieces) == whole[key].numel()
                own = rank % shards
                wanted = pieces[own].numel() if own < len(pieces) else 0
                assert parameter.to_local().numel() == wanted, f"{name}: {key}"


@pytest.mark.slow
@pytest.mark.distributed
def test_shards_of_real_recipes_make_up_their_networks() -> None:
    run_processes(_shard_with_fsdp, 1)


def _step_with_fsdp(_: Ranks) -> None:
    recipe = load_recipe(
        RECIPES / "vitg_384.yaml",
        [
            "engine.device=cpu",
            "engine.prefetch=2",
            "engine.compile=false",
            "engine.activation_checkpointing=full",
            "model.encoder.depth=2",
            "model.predictor.depth=2",
        ],
    )
    with one_of_many(5, 128) as ranks:
        networks = networks_of(recipe)
        engine = build_engine(recipe.engine, ranks)
        shard_all(engine, networks, no_bytes)
        engine.start_optimizer(recipe.optimizer, {name: networks[name] for name in ("encoder", "predictor")})
        encoder, predictor, target = networks.values()
        clips = torch.randn(1, 3, 4, 32, 32)  # 2 × 2 × 2 tokens
        context, wanted = torch.tensor([[0, 3, 5]]), torch.tensor([[1, 2, 4, 6, 7]])

        def loss() -> Tensor:
            with torch.no_grad():
                features = target(clips)
            predicted = predictor(encoder(clips, context), context, wanted, (2, 2, 2))
            return (predicted - features[:, wanted[0]]).abs().mean()

        engine.backward(loss, share=1.0, last=True)
        for key, parameter in named_parameters({"encoder": encoder, "predictor": predictor}):
            if key == "predictor.mask_tokens.1":
                continue  # of the second generator
            assert isinstance(parameter.grad, DTensor), key
            assert parameter.grad.to_local().shape == parameter.to_local().shape  # type: ignore[attr-defined]
            assert parameter.grad.dtype == torch.float32
        engine.step(1e-4)
        engine.ema_update(target, encoder, 0.9)


@pytest.mark.distributed
def test_a_step_of_vit_g_blocks_on_one_of_128_ranks() -> None:
    """Gathers, prefetches, recomputation and reductions of real widths, two blocks deep."""
    run_processes(_step_with_fsdp, 1)


def _partition_with_zero(_: Ranks, stage: int) -> None:
    from vjepa_scale.distributed.zero import ZeroEngine

    recipe = load_recipe(
        RECIPES / "vitg_384.yaml",
        ["engine.device=cpu", "engine.kind=deepspeed", f"engine.zero_stage={stage}", "engine.compile=false", *SHALLOW],
    )
    with one_of_many(5, 128) as ranks:
        networks = networks_of(recipe)
        trained = {name: networks[name] for name in ("encoder", "predictor")}
        count = sum(parameter.numel() for _, parameter in named_parameters(trained))
        engine = build_engine(recipe.engine, ranks)
        assert isinstance(engine, ZeroEngine)
        shard_all(engine, networks, zeros)
        engine.start_optimizer(recipe.optimizer, trained)
        masters = (
            engine._zero.fp32_partitioned_groups_flat if stage == 3 else engine._zero.single_partition_of_fp32_groups
        )
        # Whole pieces of the same size for every rank: a few elements of padding at most.
        assert count / 128 <= sum(master.numel() for master in masters) <= count / 128 + PADDING[stage] * count
        held = sum(engine._local(parameter).numel() for _, parameter in named_parameters(trained))
        assert held == count if stage < 3 else held < count / 100


# Of a part of 128: groups are padded as a whole under ZeRO 1 and 2, each tensor under ZeRO 3.
PADDING = {1: 1e-5, 2: 1e-5, 3: 1e-4}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_zero_partitions_vit_g_blocks_over_128_ranks(stage: int) -> None:
    run_processes(_partition_with_zero, 1, stage)
