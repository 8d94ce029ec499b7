"""FSDP2: plain networks become sharded ones. ``FsdpEngine.shard`` is the whole of it, in order."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from vjepa_scale.core.ranks import Ranks
from vjepa_scale.model.init import initial_value
from vjepa_scale.parallel.attention import set_kernel
from vjepa_scale.parallel.ema import ShardedEma, sharded_parameters
from vjepa_scale.parallel.mesh import build_mesh
from vjepa_scale.parallel.process_group import pick_device
from vjepa_scale.recipe.schema import EngineConfig

# A block is what is checkpointed, compiled and gathered as one: an entry of a list of one of these names.
BLOCK_LISTS = ("blocks", "predictor_blocks")


class InitialValue(Protocol):
    """The start of the parameter of that canonical name: float32, on the CPU."""

    def __call__(self, name: str, shape: torch.Size, *, seed: int) -> Tensor: ...


class FsdpEngine:
    """Shards networks over all processes of the started group, and does what needs all of them.

    Every process is a data-parallel rank, in hybrid sharding too. Parameters, gradients, optimiser state and
    EMA stay float32 and sharded; with ``precision: bfloat16`` a block computes with bf16 copies of its
    parameters, gathered for the moment, and gradients are averaged in float32.
    """

    def __init__(self, cfg: EngineConfig, ranks: Ranks) -> None:
        self._cfg = cfg
        self.device = pick_device(cfg, ranks)
        self.dp_rank, self.dp_world_size = dist.get_rank(), dist.get_world_size()
        self.mesh = build_mesh(self.device.type, world_size=self.dp_world_size, replicate=cfg.replicate)
        self.attention = ""  # the name of the kernel in use
        self._compute_type = torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32
        self._ema: dict[nn.Module, ShardedEma] = {}

    # -- from a plain network to a sharded one -------------------------------------------------------

    def shard(
        self,
        network: nn.Module,
        *,
        name: str,
        seed: int,
        trainable: bool,
        initial_value: InitialValue = initial_value,
    ) -> nn.Module:
        """Choose kernels, checkpoint activations, shard, materialise, initialise; returns the same module.

        network: built on the meta device, without buffers (nobody would give them values).
        name:    prefix of its parameters' canonical names: the key of their initial values together with
                 ``seed``. Values do not depend on the number of processes; two networks of one architecture
                 under one name start equal.
        """
        assert all(parameter.is_meta for parameter in network.parameters()), "build the network on the meta device"
        assert not list(network.buffers()), "buffers are not initialised here: compute such tables in forward"
        network.requires_grad_(trainable)
        blocks = blocks_of(network)

        self.attention = set_kernel(network, self._cfg.attention, device=self.device, dtype=self._compute_type)

        if trainable and self._cfg.activation_checkpointing == "full":
            for block in blocks:
                checkpoint_activations(block)

        network.register_forward_hook(_own_output)  # before FSDP's, which then sees what this returns

        # A frozen network has no backward pass that would shard it again: left gathered (FSDP2's default for a
        # root), every write to its shards would be hidden until one came.
        reshard = self._cfg.reshard_after_forward or not trainable
        for block in blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=self._policy(root=False), reshard_after_forward=reshard)
        fully_shard(network, mesh=self.mesh, mp_policy=self._policy(root=True), reshard_after_forward=reshard)

        network.to_empty(device=self.device)

        for parameter_name, parameter in sharded_parameters(network).items():
            full = initial_value(f"{name}.{parameter_name}", parameter.shape, seed=seed)
            assert full.dtype == parameter.dtype == torch.float32, f"{parameter_name}: master weights are float32"
            fill_shard(parameter, full)
        return network

    def _policy(self, *, root: bool) -> MixedPrecisionPolicy:
        # Only the root casts what comes in: it turns clips and features into the compute type once, and what
        # blocks get beside tokens, float32 RoPE tables, passes through as it is. Only its output is float32:
        # in between, LayerNorm needs input and weights of one type.
        return MixedPrecisionPolicy(
            param_dtype=None if self._compute_type == torch.float32 else self._compute_type,
            reduce_dtype=torch.float32,
            output_dtype=torch.float32 if root else None,
            cast_forward_inputs=root,
        )

    # -- what a training step needs -------------------------------------------------------------------

    @contextmanager
    def accumulating(self, networks: Iterable[nn.Module], *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are averaged over ranks in the last one only.

        Until then each rank holds its own sum, unsharded, in float32.
        """
        networks = list(networks)
        _set_gradient_sync(networks, last)
        try:
            yield
        finally:
            _set_gradient_sync(networks, True)

    def mean(self, x: Tensor) -> Tensor:
        """The average of a float tensor over all ranks: equal on all of them, no gradient."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total.div_(self.dp_world_size)

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """L2 norm of all gradients together, of the whole network on every rank."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        if gradients := _local_gradients(parameters):
            squares += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        dist.all_reduce(squares, group=self.mesh.get_group("shard"))  # replicas hold the same gradients
        return float(squares.sqrt())

    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply all gradients: clipping is scaling by ``limit / grad_norm`` where that is below 1."""
        if gradients := _local_gradients(parameters):
            torch._foreach_mul_(gradients, factor)

    def match_ema(self, target: nn.Module, source: nn.Module) -> None:
        """Check, before training, that ``ema_update`` can average these two shard by shard."""
        self._ema[target] = ShardedEma(target, source)

    def ema_update(self, target: nn.Module, source: nn.Module, momentum: float) -> None:
        """θ̄ ← m·θ̄ + (1−m)·θ for all parameters of ``target`` (θ̄) and ``source`` (θ)."""
        if target not in self._ema:
            self.match_ema(target, source)
        self._ema[target].update(momentum)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network, in the order of its definition."""
    return [
        block
        for path, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in BLOCK_LISTS
        for block in module
    ]


def checkpoint_activations(block: nn.Module) -> None:
    """Keep only a block's input; compute the rest again in the backward pass.

    The forward method is replaced, not the module wrapped: parameter names stay canonical. FSDP's hooks
    stay outside, so the parameters are gathered when the block is computed again.
    """
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _own_output(network: nn.Module, inputs: tuple[object, ...], output: Any) -> Any:
    """A network's output that is no view: an in-place operation on a view would cut off FSDP's backward hook."""
    if isinstance(output, list):  # of several layers
        return [_own_output(network, inputs, one) for one in output]
    return output.clone() if output.requires_grad and output._is_view() else output


@torch.no_grad()
def fill_shard(tensor: Tensor, full: Tensor) -> None:
    """Write this rank's shard of a whole tensor, which every rank has, into a sharded one (or a plain one)."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(full)
        return
    local = tensor.to_local()
    # src_data_rank=None: every rank has the same full value already, nothing is sent.
    shards = distribute_tensor(full.to(local.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    local.copy_(shards.to_local())


def _set_gradient_sync(networks: Iterable[nn.Module], on: bool) -> None:
    for network in networks:
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(on)
        network.set_is_last_backward(on)


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            gradients.append(parameter.grad.to_local())
    return gradients
