"""What is compiled and what is kept: counted, not believed."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.jepa_shape import MODEL
from vjepa_scale.distributed.prepare_blocks import blocks_of, checkpoint_activations, prepare_blocks
from vjepa_scale.model.blocks import Block
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.model.positions import rope_tables
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.recipe.schema import EngineConfig


def encoder() -> Encoder:
    network = Encoder(MODEL)
    initialise(network, seed=3, prefix="encoder")
    return network


class Products(TorchDispatchMode):
    """Counts matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(word in str(func) for word in ("mm.default", "scaled_dot_product_flash_attention_for_cpu"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("selective", "again"), [(False, 4 + 1), (True, 0)])
def test_what_a_checkpoint_computes_again(selective: bool, again: int) -> None:
    """Per block: products of qkv, proj, fc1, fc2 and one attention in full, none of them where they are kept."""
    clips = torch.randn(2, 3, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    counts = {}
    gradients = {}
    for checkpointed in (False, True):
        network = encoder()
        if checkpointed:
            for block in blocks_of(network):
                checkpoint_activations(block, selective=selective)
        loss = network(clips).square().mean()
        with Products() as backward:
            loss.backward()
        counts[checkpointed] = backward.count
        gradients[checkpointed] = [p.grad for p in network.parameters()]
    # The last thing a block computes is not needed to go back through it, and is left out.
    assert counts[True] - counts[False] in (again * MODEL.encoder.depth, (again - 1) * MODEL.encoder.depth)
    for found, wanted in zip(gradients[True], gradients[False], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("width", "heads", "hidden", "stream"), [(1408, 22, 6144, torch.bfloat16), (384, 12, 1536, torch.float32)]
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_bytes_that_a_block_keeps_for_each_token(
    width: int, heads: int, hidden: int, stream: torch.dtype, checkpointed: bool
) -> None:
    """Of ViT-g's blocks and the predictor's, in bf16: what decides how many clips fit on a GPU. With checkpoints only
    what comes in; else the residual stream twice, and in bf16 both norms, q·k·v, q and k rotated, what attention gives,
    and both sides of GELU."""
    block = Block(width, heads, hidden).bfloat16()
    if checkpointed:
        checkpoint_activations(block)
    tokens = 64
    x = torch.randn(1, tokens, width, dtype=stream, requires_grad=True)
    tables = rope_tables(None, grid=(4, 4, 4), head_dim=width // heads, layout="tiled")
    constant = {t.untyped_storage().data_ptr() for t in (*block.parameters(), tables.cos, tables.signed_sin)}
    kept: dict[int, int] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in constant:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = block(x, tables)
    whole = 2 * width * stream.itemsize + 2 * (2 + 3 + 2 + 1) * width + 2 * 2 * hidden
    assert out.dtype == stream
    assert sum(kept.values()) / tokens == pytest.approx(
        width * stream.itemsize if checkpointed else whole, rel=0.02
    )  # and a number for each head, and norm


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _package_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    calls.append(q.shape)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _package_backward(ctx, gradient):  # its own, as flash-attn's: the forward operation is not asked again for it
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        out = torch.nn.functional.scaled_dot_product_attention(*inputs)
    return torch.autograd.grad(out, inputs, gradient)


_package_forward.register_autograd(
    _package_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
calls: list[torch.Size] = []


@pytest.mark.parametrize(("selective", "times"), [(False, 2), (True, 1)])
def test_attention_of_a_package_is_kept_too(selective: bool, times: int) -> None:
    """flash-attn's operation has this name (a stand-in computes it here)."""
    network = encoder()
    for block in blocks_of(network):
        block.attn.kernel = lambda q, k, v, _: _package_forward(q, k, v)
        checkpoint_activations(block, selective=selective)
    calls.clear()
    network(torch.randn(1, 3, 4, 16, 24)).square().mean().backward()
    assert len(calls) == times * MODEL.encoder.depth


@pytest.mark.slow
def test_blocks_compile_a_bounded_number_of_times() -> None:
    """With and without gradient, each for one number of tokens and then for any: all blocks share these graphs."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    network, plain = encoder(), encoder()
    compiled = torch.compile
    try:
        torch.compile = lambda function, **kwargs: compiled(function, backend=backend, **kwargs)
        prepare_blocks(network, EngineConfig(compile=True), trainable=True)
    finally:
        torch.compile = compiled
    clips = torch.randn(2, 3, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    counts = []
    for step in range(30):
        keep = torch.arange(2 + step % 10).expand(2, -1)
        torch.testing.assert_close(network(clips, keep), plain(clips, keep), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(network(clips), plain(clips), rtol=1e-5, atol=1e-6)
        counts.append(len(graphs))
    assert 1 <= counts[2] <= 6  # of which one is for each first shape
    assert counts[-1] == counts[2]


@pytest.mark.slow
def test_networks_of_a_step_and_clips_of_several_lengths_compile_in_the_first_steps() -> None:
    """Target encoder, encoder and predictor, whose masks change from step to step, on clips of three lengths.

    Each kind is compiled once, and none is left to plain Python because there are many.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled, limit = torch.compile, torch._dynamo.config.recompile_limit
    networks = {"encoder": Encoder(MODEL), "target": Encoder(MODEL), "predictor": Predictor(MODEL)}
    plain = copy.deepcopy(networks)
    try:
        torch.compile = lambda function, **kwargs: compiled(function, backend=backend, **kwargs)
        for network in networks.values():
            prepare_blocks(network, EngineConfig(compile=True), trainable=True)
    finally:
        torch.compile = compiled
    counts = []
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for step in range(12):
                for frames, clips in ((4, 3), (8, 2), (16, 1)):
                    given = torch.randn(clips, 3, frames, 16, 24, generator=torch.Generator().manual_seed(step))
                    tokens, grid = frames // 2 * 6, (frames // 2, 2, 3)
                    order = torch.arange(tokens).expand(clips, -1)
                    cut = 3 + step % 7
                    outs = []
                    for of in (networks, plain):
                        with torch.no_grad():
                            target = of["target"](given)
                        context = of["encoder"](given, order[:, :cut])
                        predicted = of["predictor"](context, order[:, :cut], order[:, cut:], grid)
                        outs.append((predicted - target[:, cut:]).abs().mean())
                    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
                    outs[0].backward()
                counts.append(len(graphs))
    finally:
        torch._dynamo.config.recompile_limit = limit
    assert counts[-1] == counts[2]
