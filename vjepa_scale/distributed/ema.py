"""The exponential moving average of sharded parameters, computed on local shards only."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class ShardedEma:
    """Keeps ``target`` an average of ``source``: two networks of one architecture, sharded in the same way.

    Names, placements and dtypes are checked once, here. Raises AssertionError if they differ: shard i of one
    must hold the same elements as shard i of the other, or the average would mix different elements.
    """

    def __init__(self, target: nn.Module, source: nn.Module) -> None:
        self._target, self._source = target, source
        self._target_parameters, self._source_parameters = sharded_parameters(target), sharded_parameters(source)
        assert self._target_parameters.keys() == self._source_parameters.keys(), "EMA: parameter names differ"
        for name, ours in self._target_parameters.items():
            theirs = self._source_parameters[name]
            assert ours.shape == theirs.shape, f"EMA: {name} has shapes {ours.shape}, {theirs.shape}"
            assert (ours.device_mesh, ours.placements) == (theirs.device_mesh, theirs.placements), (
                f"EMA: {name} is placed {ours.placements} in the target, {theirs.placements} in the source"
            )
            assert ours.dtype == theirs.dtype == torch.float32, f"EMA: {name} is not float32"
            assert not ours.requires_grad, f"EMA: {name} of the target is trained"
        self._target_shards = [parameter.to_local() for parameter in self._target_parameters.values()]
        self._source_shards = [parameter.to_local() for parameter in self._source_parameters.values()]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """θ̄ ← m·θ̄ + (1−m)·θ, in float32."""
        # A network that is still gathered after a forward pass uses a copy: writes to its shards would be lost, and
        # reads would be stale.
        for network, parameters in (
            (self._target, self._target_parameters),
            (self._source, self._source_parameters),
        ):
            for name, now in network.named_parameters():
                assert now is parameters[name], f"EMA: {name} is not in its sharded state"
        torch._foreach_lerp_(self._target_shards, self._source_shards, 1.0 - momentum)


def sharded_parameters(network: nn.Module) -> dict[str, DTensor]:
    """Returns the parameters of a network in its sharded state, by canonical name."""
    parameters: dict[str, DTensor] = {}
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not in its sharded state"
        parameters[name] = parameter
    return parameters
