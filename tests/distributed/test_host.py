"""What a step asks of the network and of the host, counted.

Collectives and their bytes on one of 512 ranks under PyTorch's fake process group; waits for the device; copies
to it that block. No GPU is needed for any of it.
"""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.test_real_recipes import one_of_many
from tests.processes import ENGINE, run_processes
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.batch import MaskPair, MicroBatch
from vjepa_scale.distributed.engine import Engine, build_engine
from vjepa_scale.distributed.optim import named_parameters
from vjepa_scale.eval.observation import Observation
from vjepa_scale.model import positions
from vjepa_scale.objective.jepa import Jepa
from vjepa_scale.recipe import Recipe, load_recipe, stages_of
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.training.step import training_step

WORLD, NODE = 512, 8
DEPTH, PREDICTOR_DEPTH = 3, 2
BF16 = ENGINE.model_copy(update={"precision": "bfloat16"})


def recipe_of(engine: EngineConfig) -> Recipe:
    recipe = load_recipe(
        "recipes/vitg_256.yaml",
        [
            f"model.encoder={{width: 24, depth: {DEPTH}, heads: 4}}",
            f"model.predictor={{width: 16, depth: {PREDICTOR_DEPTH}, heads: 2}}",
            "engine.device=cpu",
        ],
    )
    return recipe.model_copy(update={"engine": engine})


def batch(clips: int = 2) -> MicroBatch:
    """2 × 2 × 3 tokens, two generators of other lengths."""
    order = torch.arange(12).expand(clips, -1)
    masks = tuple(MaskPair(order[:, :k].contiguous(), order[:, k:].contiguous()) for k in (5, 7))
    pixels = torch.zeros(clips, 3, 4, 32, 48, dtype=torch.uint8)
    return MicroBatch(pixels, masks, 0, range(clips), ("none",) * clips)


class Collectives(TorchDispatchMode):
    """(operation, processes) -> how often, and bytes: of what a gather gives, and of what is reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            (group,) = (
                dist.ProcessGroup.unbox(one) for one in args if isinstance(one, torch.ScriptObject) and _is_group(one)
            )
            tensors = args[1] if name == "_reduce_scatter_base_" else args[0]  # (output, input, …)
            tensors = tensors if isinstance(tensors, list | tuple) else [tensors]
            self.count[name, group.size()] += 1
            self.bytes[name, group.size()] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def _is_group(one: torch.ScriptObject) -> bool:
    return "ProcessGroup" in one._type().qualified_name()


def after_a_step(recipe: Recipe, ranks: Ranks) -> tuple[Jepa, Engine]:
    """The first step sets things up."""
    engine = build_engine(recipe.engine, ranks)
    objective = Jepa(stages_of(recipe)["pretrain"], engine)
    engine.start_optimizer(recipe.optimizer, objective.trained, unreached=objective.unreached)
    training_step(objective, engine, [batch()], lr=1e-4)
    return objective, engine


def _counted(_: Ranks, update: dict[str, Any]) -> tuple[Counter[Any], Counter[Any], dict[str, int]]:
    """Of the second step; and the bytes of networks in bf16, padded to the shards."""
    recipe = recipe_of(BF16.model_copy(update=update))
    with one_of_many(5, WORLD) as ranks:
        objective, engine = after_a_step(recipe, ranks)
        with Collectives() as seen:
            training_step(objective, engine, [batch()], lr=1e-4)
        shards = {"auto": NODE, 1: WORLD, "all": 1}[recipe.engine.replicate]
        sizes: Counter[str] = Counter()
        for name, parameter in named_parameters(objective.networks):
            network, *inside = name.split(".")
            part = "blocks" if "blocks" in inside[0] else "mask token" if name.endswith("tokens.1") else "rest"
            rows = len(parameter)
            sizes[f"{network} {part}"] += 2 * parameter.numel() // rows * -(-rows // shards) * shards
    return seen.count, seen.bytes, sizes


ENCODER, PREDICTOR = DEPTH + 1, PREDICTOR_DEPTH + 1  # gathered as one: each block, and the rest of a network


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("update", "shards", "times"),
    [
        # Each pass of the two generators gathers in its forward and in its backward.
        ({}, WORLD, 4),
        # Inside a node, once for both passes.
        ({"replicate": "auto", "reshard_after_forward": "auto"}, NODE, 1),
        ({"replicate": "auto"}, NODE, 4),
    ],
    ids=["sharded over all", "a copy per node, kept", "a copy per node"],
)
def test_collectives_of_a_step(update: dict[str, Any], shards: int, times: int) -> None:
    ((count, size, bf16),) = run_processes(_counted, 1, update)
    trained = sum(value for name, value in bf16.items() if not name.startswith("target"))
    target = sum(value for name, value in bf16.items() if name.startswith("target"))
    gathers, scatters = ("_allgather_base_", shards), ("_reduce_scatter_base_", shards)
    # The rest of the encoder stays gathered from one backward pass to the next. A generator's mask token is met in one
    # pass only: the first of them is reduced alone.
    kept = times > 1
    wanted = {
        gathers: ENCODER + times * (ENCODER + PREDICTOR) - kept,  # the target encoder's, once
        scatters: ENCODER + PREDICTOR + 1,
        ("allreduce_", WORLD): 1,  # loss, flags and norms of gradients in one
    }
    # What is reduced is float32.
    bytes_of = {gathers: target + times * trained - kept * bf16["encoder rest"], scatters: 2 * trained}
    if shards == NODE:  # then over the nodes, what a rank has of it
        wanted["allreduce_", WORLD // NODE] = ENCODER + PREDICTOR + 1
        bytes_of["allreduce_", WORLD // NODE] = 2 * trained // NODE
    assert dict(count) == wanted
    assert {key: size[key] for key in bytes_of} == bytes_of


def _gathered(_: Ranks, ahead: int) -> dict[str, int]:
    """How many gathers have been issued when a block begins, in a step's first pass, which is sharded over all."""
    recipe = recipe_of(BF16.model_copy(update={"prefetch": ahead}))
    found: dict[str, int] = {}
    with one_of_many(5, WORLD) as ranks:
        objective, engine = after_a_step(recipe, ranks)
        with Collectives() as seen:

            def note(name: str) -> None:
                found.setdefault(name, sum(count for (kind, _), count in seen.count.items() if "gather" in kind))

            # After FSDP's own hooks, which were there before.
            last = {"target": objective.target_encoder.blocks[-1], "encoder": objective.encoder.blocks[-1]}
            for name, block in last.items():
                block.register_forward_pre_hook(lambda *_, name=name: note(name))
            objective.predictor.predictor_blocks[0].register_forward_hook(
                lambda _, __, output: output.register_hook(lambda _: note("predictor, backward")) and None
            )
            training_step(objective, engine, [batch()], lr=1e-4)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_next_networks_weights_are_gathered_early(ahead: int) -> None:
    (found,) = run_processes(_gathered, 1, ahead)
    early = ahead and 1 + ahead  # what a network has beside its blocks, and blocks
    forward = ENCODER + 2 * (ENCODER + PREDICTOR)
    assert found == {
        "target": ENCODER + early,
        "encoder": 2 * ENCODER + early,
        "predictor, backward": forward + PREDICTOR + early,
    }


# -- the host --------------------------------------------------------------------------------------------


def _waits(_: Ranks, observed: bool) -> list[str]:
    """What a step reads from tensors, outside the optimiser, which on a GPU is one kernel that reads nothing."""
    recipe = recipe_of(ENGINE)
    with one_of_many(5, WORLD) as ranks:
        objective, engine = after_a_step(recipe, ranks)
        training_step(objective, engine, [batch()], lr=1e-4, observe=Observation(["none"]))  # sets up what it measures
        found: list[str] = []
        observe = Observation(["none"]) if observed else None
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "item", "cpu", "__float__", "__int__", "__bool__", "numpy"):
                patch.setattr(Tensor, name, _noting(found, name, getattr(Tensor, name)))
            usual = engine.step

            def step(lr: float) -> None:
                before = len(found)
                usual(lr)
                del found[before:]

            patch.setattr(engine, "step", step)
            training_step(objective, engine, [batch(), batch()], lr=1e-4, clip_grad_norm=1.0, observe=observe)
        return found


def _noting(found: list[str], name: str, method: Any) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(name)
        return method(*args, **kwargs)

    return noted


@pytest.mark.distributed
@pytest.mark.parametrize("observed", [False, True])
def test_a_step_waits_once_for_the_device(observed: bool) -> None:
    """Also a step in which figures are measured: a thread of rank 0 reads them."""
    assert run_processes(_waits, 1, observed) == [["tolist"]]


class Blocking(TorchDispatchMode):
    """Operations that would block the host if tensors elsewhere were on a GPU: copies to them, and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.crossed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = [one for one in args if isinstance(one, Tensor)]
        crosses = isinstance(out, Tensor) and any(one.device != out.device and one.ndim > 0 for one in given)
        self.crossed += crosses
        asked = (kwargs or {}).get("non_blocking") or any(one is True for one in args[2:])
        if name == "_local_scalar_dense" or (name in ("_to_copy", "copy_") and crosses and not asked):
            self.found.append(f"{name} {[tuple(one.shape) for one in given]}")
        return out


class OnStandIns:
    """An engine whose networks are plain ones, on the device that it names."""

    device = torch.device("meta")

    def shard(self, network: nn.Module, *, trainable: bool, **_: Any) -> nn.Module:
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                there = torch.empty(parameter.shape, device=self.device)
                setattr(module, name, nn.Parameter(there, requires_grad=trainable))
        return network

    def match_ema(self, *_: nn.Module) -> None:
        pass

    def set_forward_order(self, _: list[nn.Module]) -> None:
        pass


@pytest.mark.parametrize("observed", [False, True])
def test_no_copy_inside_the_loss_blocks(observed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From tensors on the CPU to such without memory. Tables of rotary positions are there: the next test."""

    def axis_tables(length: int, scale: float, channels: int, layout: str, device: torch.device) -> Tensor:
        return torch.zeros(2, length, channels, device=device)

    monkeypatch.setattr(positions, "_axis_tables", axis_tables)
    objective = Jepa(stages_of(recipe_of(ENGINE))["pretrain"], OnStandIns())  # type: ignore[arg-type]
    given = batch()
    if observed:
        objective.loss(given, Observation(["none"]))  # indices of tokens, which are copied once
    observe = Observation(["none"]) if observed else None
    with Blocking() as seen:
        loss = objective.loss(given, observe)["loss"]
        loss.backward()
    assert loss.device == OnStandIns.device
    assert seen.crossed == 1 + 4  # clips, and both masks of two generators
    assert seen.found == []


def test_rotary_tables_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[Any, ...]] = []
    usual = positions._compute_axis_tables
    monkeypatch.setattr(positions, "_kept", {})
    monkeypatch.setattr(positions, "_compute_axis_tables", lambda *key: (computed.append(key), usual(*key))[1])
    index = torch.tensor([[0, 5, 7]])
    first = positions.rope_tables(index, grid=(2, 3, 4), head_dim=16, layout="tiled")
    with torch.inference_mode():  # what is kept there must serve training, too
        positions.rope_tables(index, grid=(2, 3, 5), head_dim=16, layout="tiled")
    then = positions.rope_tables(index, grid=(2, 3, 5), head_dim=16, layout="tiled")
    again = positions.rope_tables(index, grid=(2, 3, 4), head_dim=16, layout="tiled")
    assert len(computed) == len(set(computed)) == 4  # of lengths 2, 3, 4 and 5
    assert torch.equal(first.cos, again.cos)
    assert torch.equal(first.signed_sin, again.signed_sin)
    weight = torch.ones(3, 16, requires_grad=True)
    (weight * then.cos).sum().backward()
    assert torch.equal(weight.grad, then.cos[0])
