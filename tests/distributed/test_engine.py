"""What the engine promises beside the arithmetic of a step: starts, averages, precision, communication, EMA."""

import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.distributed.jepa_shape import MODEL, batch, loss_of, start, train_sharded
from tests.processes import ENGINE, run_processes
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.distributed.fsdp import FsdpEngine
from vjepa_scale.distributed.optim import TOGETHER
from vjepa_scale.model import blocks
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.model.positions import RopeTables
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.recipe.stage_sections import OptimizerConfig
from vjepa_scale.training.preflight import check_installed

pytestmark = pytest.mark.distributed

BF16 = ENGINE.model_copy(update={"precision": "bfloat16"})


def sharded_encoder(engine: FsdpEngine, *, trainable: bool = True, name: str = "encoder") -> nn.Module:
    with torch.device("meta"):
        encoder = Encoder(MODEL)
    return engine.shard(encoder, name=name, seed=3, trainable=trainable)


# -- initial values ----------------------------------------------------------------------------------


def _starts(ranks: Ranks) -> dict[str, torch.Tensor]:
    encoder = sharded_encoder(FsdpEngine(ENGINE, ranks))
    return {name: p.full_tensor().detach() for name, p in encoder.named_parameters()}


def test_initial_values_are_those_of_a_plain_network_at_any_world_size() -> None:
    plain = Encoder(MODEL)
    initialise(plain, seed=3, prefix="encoder")
    for world_size in (1, 4):
        for starts in run_processes(_starts, world_size):
            assert starts.keys() == dict(plain.named_parameters()).keys()
            for name, parameter in plain.named_parameters():
                assert torch.equal(starts[name], parameter), name


# -- averages ------------------------------------------------------------------------------------------


def _one_weight(ranks: Ranks, cfg: EngineConfig) -> tuple[float, float, float]:
    engine = FsdpEngine(cfg, ranks)
    with torch.device("meta"):
        network = nn.Linear(1, 1, bias=False)
    engine.shard(network, name="n", seed=0, trainable=True, initial_value=lambda name, shape, seed: torch.ones(shape))
    (parameter,) = network.parameters()
    engine.start_optimizer(OptimizerConfig(), {"n": network})
    clip = torch.tensor([[10.0**ranks.rank]])
    engine.backward(lambda: network(clip).sum(), share=1.0, last=True)  # the gradient is the input
    assert isinstance(parameter.grad, DTensor)
    gradient = float(parameter.grad.full_tensor())
    engine.scale_gradients({TOGETHER: 0.5})
    return gradient, engine.reduced(torch.zeros(0))[1][TOGETHER], float(engine.mean(torch.tensor(float(ranks.rank))))


@pytest.mark.parametrize("replicate", [1, 2])
def test_gradients_are_averaged_not_summed(replicate: int) -> None:
    cfg = ENGINE.model_copy(update={"replicate": replicate})
    for gradient, halved_norm, mean_rank in run_processes(_one_weight, 4, cfg, cfg=cfg):
        assert gradient == pytest.approx((1 + 10 + 100 + 1000) / 4)
        assert halved_norm == pytest.approx((1 + 10 + 100 + 1000) / 8)
        assert mean_rank == 1.5


# -- communication -------------------------------------------------------------------------------------


def _gradient_collectives(ranks: Ranks) -> list[int]:
    engine = FsdpEngine(ENGINE, ranks)
    encoder = sharded_encoder(engine)
    engine.start_optimizer(OptimizerConfig(), {"encoder": encoder})
    counts = []
    for last in (False, False, True):
        with CommDebugMode() as mode:
            engine.backward(lambda: encoder(batch(0)[0][:1]).sum(), share=1.0, last=last)
        counts.append(mode.get_comm_counts()[torch.ops.c10d._reduce_scatter_base_])
    return counts


def test_only_the_last_micro_batch_communicates_gradients() -> None:
    for counts in run_processes(_gradient_collectives, 2):
        assert counts == [0, 0, MODEL.encoder.depth + 1]  # one per block and one for the rest


def _gradient_after_in_place_change(ranks: Ranks) -> float:
    engine = FsdpEngine(ENGINE, ranks)
    with torch.device("meta"):
        network = nn.Linear(4, 4)
    engine.shard(network, name="n", seed=0, trainable=True, initial_value=start)
    network.weight.requires_grad_(False)
    engine.start_optimizer(OptimizerConfig(), {"n": network})

    def changed() -> torch.Tensor:
        output = network(torch.ones(2, 3, 4))
        output += 1
        return output.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # FSDP2 warns of outputs that are views; a Linear's of three axes is one
        engine.backward(changed, share=1.0, last=True)
    return engine.reduced(torch.zeros(0))[1][TOGETHER]


def test_outputs_may_be_changed_in_place() -> None:
    norms = run_processes(_gradient_after_in_place_change, 2)
    assert norms == pytest.approx([12.0, 12.0])  # 4 biases, each used 2 × 3 times


# -- precision -----------------------------------------------------------------------------------------


def _types_under_bf16(ranks: Ranks) -> dict[str, set[torch.dtype]]:
    engine = FsdpEngine(BF16, ranks)
    with torch.device("meta"):
        encoder, predictor, target = Encoder(MODEL), Predictor(MODEL), Encoder(MODEL)
    engine.shard(encoder, name="encoder", seed=3, trainable=True)
    engine.shard(predictor, name="predictor", seed=3, trainable=True)
    engine.shard(target, name="encoder", seed=3, trainable=False)
    seen: dict[str, set[torch.dtype]] = {"tables": set(), "tokens": set()}
    rotate = blocks.rotate

    def watching(x: torch.Tensor, tables: RopeTables) -> torch.Tensor:
        seen["tables"] |= {value.dtype for value in vars(tables).values()}
        seen["tokens"].add(x.dtype)
        return rotate(x, tables)

    blocks.rotate = watching
    clips, pairs = batch(0)
    loss = loss_of(encoder, predictor, target, clips, pairs)
    loss.backward()
    parameters = [*encoder.parameters(), *predictor.parameters()]
    seen["masters"] = {p.dtype for p in [*parameters, *target.parameters()]}
    seen["gradients"] = {p.grad.dtype for p in parameters if p.grad is not None}
    seen["features"] = {encoder(clips).dtype}
    return seen


def test_bf16_computes_in_bf16_and_keeps_the_rest_in_float32() -> None:
    for seen in run_processes(_types_under_bf16, 2, cfg=BF16):
        assert seen["tokens"] == {torch.bfloat16}
        for name in ("tables", "masters", "gradients", "features"):
            assert seen[name] == {torch.float32}, name


def _residual_streams(ranks: Ranks, cfg: EngineConfig) -> tuple[list[torch.dtype], list[torch.dtype], bool]:
    """Of the blocks of encoder and predictor; and whether a network's features are rounded to bf16."""
    engine = build_engine(cfg, ranks)
    with torch.device("meta"):
        encoder, predictor, target = Encoder(MODEL), Predictor(MODEL), Encoder(MODEL)
    trained = {"encoder": encoder, "predictor": predictor}
    for name, network in trained.items():
        engine.shard(network, name=name, seed=3, trainable=True, initial_value=start)
    engine.shard(target, name="encoder", seed=3, trainable=False, initial_value=start)
    engine.start_optimizer(OptimizerConfig(), trained, unreached=frozenset({"predictor.mask_tokens.2"}))
    streams: dict[str, list[torch.dtype]] = {"encoder": [], "predictor": []}
    features = []
    for name, block in (("encoder", encoder.blocks[1]), ("predictor", predictor.predictor_blocks[0])):
        block.register_forward_pre_hook(lambda _, inputs, name=name: streams[name].append(inputs[0].dtype))
    target.register_forward_hook(lambda _, __, output: features.append(output))
    clips, pairs = batch(0)
    engine.backward(lambda: loss_of(encoder, predictor, target, clips, pairs), share=1.0, last=True)
    return streams["encoder"], streams["predictor"], torch.equal(features[0], features[0].bfloat16().float())


@pytest.mark.parametrize("zero", [None, 2, 3], ids=["FSDP2", "ZeRO 2", "ZeRO 3"])
def test_what_bf16_leaves_in_float32(zero: int | None) -> None:
    """As in the published code under autocast: what a network gives, and the predictor's residual stream, of which its
    float32 mask tokens are a part. The encoder's stream is bf16 there, too."""
    engine = BF16 if zero is None else BF16.model_copy(update={"kind": "deepspeed", "zero_stage": zero})
    for encoder, predictor, rounded in run_processes(_residual_streams, 2, engine, cfg=engine):
        assert set(encoder) == {torch.bfloat16}
        assert set(predictor) == {torch.float32}
        assert not rounded


def _trained(ranks: Ranks, precise: EngineConfig, other: EngineConfig) -> tuple[list[float], list[float]]:
    """Losses and sums of weights under AdamW, losses under SGD with the other configuration."""
    outcome = train_sharded(ranks, precise, "adamw", 1e-3)
    bits = [*outcome.losses, *(float(w.double().sum()) for w in outcome.weights.values())]
    return bits, train_sharded(ranks, other).losses


@pytest.fixture(scope="module")
def trained() -> list[list[tuple[list[float], list[float]]]]:
    """Two starts of a group: of every rank, the bits under AdamW and the losses in float32; in bfloat16."""
    return [run_processes(_trained, 2, ENGINE, other) for other in (ENGINE, BF16)]


def test_bf16_stays_close_to_float32(trained: list[list[tuple[list[float], list[float]]]]) -> None:
    (_, full), (_, half) = (ranks[0] for ranks in trained)
    assert half != full
    assert half == pytest.approx(full, rel=1e-2)


def test_two_runs_give_the_same_bits(trained: list[list[tuple[list[float], list[float]]]]) -> None:
    first, second = ([bits for bits, _ in ranks] for ranks in trained)
    assert first == second


# -- EMA -----------------------------------------------------------------------------------------------


def _ema_after_forward(ranks: Ranks) -> float:
    """The trap: a forward without gradient must not leave the target gathered, deaf to its shards."""
    engine = FsdpEngine(ENGINE, ranks)
    source, target = sharded_encoder(engine), sharded_encoder(engine, trainable=False, name="other")
    clips = batch(0)[0][:2]
    with torch.no_grad():
        wanted = source(clips)
        before = target(clips)
        engine.ema_update(target, source, 0.0)  # momentum 0: the target becomes the source
        after = target(clips)
    assert not torch.equal(before, wanted)
    return float((after - wanted).abs().max())


def test_the_target_computes_with_its_updated_weights() -> None:
    for difference in run_processes(_ema_after_forward, 2):
        assert difference == 0.0


def _ema_refusals(ranks: Ranks) -> list[str]:
    engine = FsdpEngine(ENGINE, ranks)
    source, target = sharded_encoder(engine), sharded_encoder(engine, trainable=False)
    messages = []
    with torch.device("meta"):
        on_other_mesh = Encoder(MODEL)
    fully_shard(on_other_mesh, mesh=FsdpEngine(ENGINE.model_copy(update={"replicate": 2}), ranks).mesh)
    on_other_mesh.to_empty(device="cpu").requires_grad_(False)
    for other in (on_other_mesh, Encoder(MODEL)):
        try:
            engine.match_ema(other, source)
        except AssertionError as error:
            messages.append(str(error))
    engine.match_ema(target, source)
    assert isinstance(target, FSDPModule)
    target.unshard()
    try:
        engine.ema_update(target, source, 0.9)
    except AssertionError as error:
        messages.append(str(error))
    dist.barrier()
    return messages


def test_ema_refuses_other_placements_and_gathered_networks() -> None:
    for misplaced, plain, gathered in run_processes(_ema_refusals, 2):
        assert "is placed" in misplaced
        assert "not in its sharded state" in plain
        assert "not in its sharded state" in gathered


# -- what shard refuses ----------------------------------------------------------------------------------


def _shard_refusals(ranks: Ranks) -> list[str]:
    engine = FsdpEngine(ENGINE, ranks)
    with torch.device("meta"):
        with_buffer = nn.BatchNorm1d(3)
        linear = nn.Linear(3, 3)
    messages = []
    for network, values in (
        (nn.Linear(3, 3), start),
        (with_buffer, start),
        (linear, lambda name, shape, seed: torch.zeros(shape, dtype=torch.bfloat16)),
    ):
        try:
            engine.shard(network, name="n", seed=0, trainable=True, initial_value=values)
        except AssertionError as error:
            messages.append(str(error))
    return messages


def test_shard_refuses_what_it_could_not_initialise() -> None:
    (messages,) = run_processes(_shard_refusals, 1)
    assert ["meta device" in messages[0], "buffers" in messages[1], "float32" in messages[2]] == [True] * 3


def test_an_engine_that_is_not_installed_is_told_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = EngineConfig(kind="deepspeed")
    check_installed(zero)
    assert "deepspeed" not in sys.modules
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if no such package were there
    check_installed(EngineConfig())
    with pytest.raises(UserError, match=r"^engine\.kind: DeepSpeed is not installed .*pip install"):
        check_installed(zero)


def _zero_gives_copies(ranks: Ranks) -> None:
    for stage in (2, 3):
        _zero_of_a_stage_gives_copies(ranks, stage)


def _zero_of_a_stage_gives_copies(ranks: Ranks, stage: int) -> None:
    engine = build_engine(ENGINE.model_copy(update={"kind": "deepspeed", "zero_stage": stage}), ranks)
    assert engine.gives_copies
    with torch.device("meta"):
        networks = {"encoder": Encoder(MODEL)}
    engine.shard(networks["encoder"], name="encoder", seed=3, trainable=True)
    engine.start_optimizer(OptimizerConfig(), networks)
    given = engine.tensors(networks, optimizer=True)
    values = {name: tensor.to_local().clone() for name, tensor in given.items()}
    engine.restore(networks, {name: tensor + 1 for name, tensor in given.items()})
    for name, tensor in engine.tensors(networks, optimizer=True).items():
        torch.testing.assert_close(tensor.to_local(), values[name] + 1)
        assert torch.equal(given[name].to_local(), values[name]), (stage, name)


def test_what_zero_gives_to_a_checkpoint_does_not_change_with_training() -> None:
    run_processes(_zero_gives_copies, 2)
