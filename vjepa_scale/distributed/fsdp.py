"""The FSDP2 engine. ``FsdpEngine.shard`` has all steps from a plain network to a sharded one, in order."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vjepa_scale.core.log import region
from vjepa_scale.core.ranks import Ranks, count_replicas
from vjepa_scale.distributed.ema import ShardedEma, sharded_parameters
from vjepa_scale.distributed.engine import Engine, InitialValue, checked_start
from vjepa_scale.distributed.optim import GroupSetting, build_optimizer, named_parameters, optimizer_tensors, set_rate
from vjepa_scale.distributed.prepare_blocks import blocks_of, prepare_blocks
from vjepa_scale.distributed.process_group import build_mesh
from vjepa_scale.model.init import initial_value
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.recipe.stage_sections import OptimizerConfig


class FsdpEngine(Engine):
    """The default engine. Parameters, gradients, optimiser state and EMA are sharded, in hybrid sharding too.

    With ``precision: bfloat16`` a block computes with temporary, gathered bf16 copies of its parameters, and gradients
    are averaged in float32.
    """

    def __init__(self, cfg: EngineConfig, ranks: Ranks) -> None:
        super().__init__(cfg, ranks)
        replicas = count_replicas(cfg.replicate, world_size=ranks.world_size, per_node=ranks.local_world_size)
        self.mesh = build_mesh(
            self.device.type, world_size=self.dp_world_size, replicate=replicas, timeout_s=cfg.timeout_s
        )
        self._gradient_copies = replicas
        self._reshards = replicas == 1 if cfg.reshard_after_forward == "auto" else cfg.reshard_after_forward
        self._order: list[nn.Module] = []  # the order in which networks run; empty after prefetching is set up
        self._ema: dict[nn.Module, ShardedEma] = {}
        self._trained: list[nn.Module] = []
        self._named: list[tuple[str, nn.Parameter]] = []
        self._shards: list[nn.Parameter] = []  # the shards of ``_named``, in its order
        self._sharded_of: dict[nn.Parameter, nn.Parameter] = {}

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
        """Chooses kernels, checkpoints activations, shards, materialises, initialises (see Engine.shard)."""
        self._accept(network, trainable=trainable)

        blocks = prepare_blocks(network, self._cfg, trainable=trainable)  # checkpointed, then compiled

        network.register_forward_hook(_own_output)  # before FSDP's, which then sees what this returns

        # A frozen network has no backward pass that would reshard it. Left gathered (FSDP2's default for a root), it
        # would not see writes to its shards.
        reshard = not trainable or self._reshards
        for block in blocks if self._cfg.shard_blocks else ():
            fully_shard(block, mesh=self.mesh, mp_policy=self._policy(root=False), reshard_after_forward=reshard)
        fully_shard(network, mesh=self.mesh, mp_policy=self._policy(root=True), reshard_after_forward=reshard)
        if not reshard:  # nor between the backward passes of a step: ``backward`` reshards at the step's end
            assert isinstance(network, FSDPModule)
            network.set_reshard_after_backward(False)
        _prefetch(blocks, self._cfg.prefetch)

        network.to_empty(device=self.device)

        for parameter_name, parameter in sharded_parameters(network).items():
            assert parameter.dtype == torch.float32, f"{parameter_name}: master weights are float32"
            full_name = f"{name}.{parameter_name}"
            fill_shard(parameter, checked_start(initial_value, full_name, parameter.shape, seed=seed))
        return network

    def _policy(self, *, root: bool) -> MixedPrecisionPolicy:
        # Only the root casts its inputs: it converts clips and features to the compute type once, and the blocks'
        # other inputs, float32 RoPE tables, are not cast. Only the root's output is float32: inside, LayerNorm
        # needs input and weights of one type.
        return MixedPrecisionPolicy(
            param_dtype=None if self.compute_type == torch.float32 else self.compute_type,
            reduce_dtype=torch.float32,
            output_dtype=torch.float32 if root else None,
            cast_forward_inputs=root,
        )

    def set_forward_order(self, networks: Sequence[nn.Module]) -> None:
        self._order = list(networks)

    # -- what a training step needs -------------------------------------------------------------------

    def start_optimizer(
        self,
        cfg: OptimizerConfig,
        trained: Mapping[str, nn.Module],
        settings: Mapping[str, GroupSetting] | None = None,
        unreached: Collection[str] = (),
    ) -> None:
        self._trained = list(trained.values())
        self._named = [(name, parameter) for name, parameter in named_parameters(trained) if parameter.requires_grad]
        # The optimiser gets only this rank's shards, as plain tensors on the same memory: it works element by element,
        # and DTensors would take most of its host time.
        shards = [(name, nn.Parameter(_shard_of(parameter))) for name, parameter in self._named]
        self._optimizer = build_optimizer(cfg, shards, settings, unreached, fused=self.device.type == "cuda")
        self._shards = [shard for _, shard in shards]
        self._sharded_of = {shard: whole for shard, (_, whole) in zip(self._shards, self._named, strict=True)}

    def backward(self, loss: Callable[[], Tensor], *, share: float, last: bool) -> Tensor:
        _set_gradient_sync(self._trained, last)  # without it each rank keeps its own sum, unsharded, in float32
        try:
            shared = loss() * share
            with region("backward"):
                shared.backward()
        finally:
            _set_gradient_sync(self._trained, True)
            if last and not self._reshards:
                _shard_again(self._trained)
        return shared.detach()

    def discard_gradients(self) -> None:
        for shard, whole in self._sharded_of.items():
            shard.grad = whole.grad = None

    def step(self, lr: float) -> None:
        set_rate(self._optimizer, lr)
        for shard in self._shards:
            shard.grad = self._gradient(shard)
        self._optimizer.step()
        self.discard_gradients()
        # After the first step, because FSDP2 creates a network's streams in its first forward.
        for before, after in pairwise(self._order):
            _prefetch_across(before, after, self._cfg.prefetch)
        self._order = []

    def match_ema(self, target: nn.Module, source: nn.Module) -> None:
        self._ema[target] = ShardedEma(target, source)

    def ema_update(self, target: nn.Module, source: nn.Module, momentum: float) -> None:
        if target not in self._ema:
            self.match_ema(target, source)
        self._ema[target].update(momentum)

    def _local_weights(self, network: nn.Module) -> list[Tensor]:
        return [parameter.to_local() for parameter in sharded_parameters(network).values()]

    # -- what a checkpoint holds ----------------------------------------------------------------------

    def tensors(self, networks: Mapping[str, nn.Module], *, optimizer: bool) -> dict[str, Tensor]:
        """Returns the state itself, not a copy."""
        state = {
            f"{prefix}.{name}": tensor
            for prefix, network in networks.items()
            for name, tensor in network.state_dict().items()
        }
        if optimizer:
            wholes = dict(self._named)
            for key, moment in optimizer_tensors(self._optimizer, zip(wholes, self._shards, strict=True)).items():
                state[key] = _like(wholes[key.split(".", maxsplit=2)[2]], moment)
        return state

    def restore(self, networks: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
        """Does nothing: the loader has written into the state itself."""

    def _gradients(self) -> dict[str, list[Tensor]]:
        gradients: dict[str, list[Tensor]] = {}
        for group in self._optimizer.param_groups:
            for shard in group["params"]:
                if (gradient := self._gradient(shard)) is not None:
                    gradients.setdefault(group["clip_group"], []).append(gradient)
        return gradients

    @torch.no_grad()
    def _gradient(self, shard: nn.Parameter) -> Tensor | None:
        gradient = self._sharded_of[shard].grad
        assert gradient is None or isinstance(gradient, DTensor)
        return None if gradient is None else gradient.to_local()


def _shard_of(whole: nn.Parameter) -> Tensor:
    """Returns this rank's shard of a parameter, on the same memory."""
    assert isinstance(whole, DTensor)
    return whole.to_local().detach()


def _like(whole: nn.Parameter, shard: Tensor) -> DTensor:
    """Returns a shard as a DTensor with the placement of a sharded parameter, on the shard's memory."""
    assert isinstance(whole, DTensor)
    return DTensor.from_local(
        shard, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _shard_again(networks: Iterable[nn.Module]) -> None:
    for network in networks:
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _prefetch(blocks: Sequence[nn.Module], ahead: int) -> None:
    """Gathers the next blocks' weights while a block computes: forward in their order, backward in reverse."""
    sharded = _sharded(blocks)
    for number, block in enumerate(sharded):
        block.set_modules_to_forward_prefetch(sharded[number + 1 : number + 1 + ahead])
        block.set_modules_to_backward_prefetch(sharded[max(0, number - ahead) : number][::-1])


def _prefetch_across(before: nn.Module, after: nn.Module, ahead: int) -> None:
    """Prefetches from the last block of a network to the next network, and in backward if both are trained.

    A network's other parameters are gathered with its blocks.
    """
    first, then = _sharded(blocks_of(before)), _sharded(blocks_of(after))
    assert isinstance(before, FSDPModule)
    assert isinstance(after, FSDPModule)
    if not (ahead and first and then):
        return
    first[-1].set_modules_to_forward_prefetch([after, *then[:ahead]])
    if any(parameter.requires_grad for parameter in before.parameters()):
        then[0].set_modules_to_backward_prefetch([before, *first[-ahead:][::-1]])


def _sharded(blocks: Iterable[nn.Module]) -> list[FSDPModule]:
    return [block for block in blocks if isinstance(block, FSDPModule)]


def _own_output(network: nn.Module, inputs: tuple[object, ...], output: Any) -> Any:
    """Returns a network's output as a tensor that is not a view: in-place operations on a view would remove FSDP's
    backward hook."""
    if isinstance(output, list):  # of several layers
        return [_own_output(network, inputs, one) for one in output]
    return output.clone() if output.requires_grad and output._is_view() else output


@torch.no_grad()
def fill_shard(tensor: Tensor, full: Tensor) -> None:
    """Writes this rank's shard of a whole tensor, which every rank has, into a sharded tensor (or a plain one)."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(full)
        return
    local = tensor.to_local()
    # src_data_rank=None: every rank has the full value, so nothing is sent.
    shards = distribute_tensor(full.to(local.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    local.copy_(shards.to_local())


def _set_gradient_sync(networks: Iterable[nn.Module], on: bool) -> None:
    for network in networks:
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(on)
        network.set_is_last_backward(on)
