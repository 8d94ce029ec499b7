"""What is compiled and what is kept: counted, not believed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.jepa_shape import MODEL
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.parallel.blocks import blocks_of, checkpoint_activations, prepare_blocks
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
