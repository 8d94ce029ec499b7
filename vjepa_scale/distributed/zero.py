"""The DeepSpeed engine: ZeRO 1, 2 and 3.

    1  every rank has all weights and gradients; optimiser state is partitioned
    2  gradients are partitioned too
    3  weights too: they are gathered for the module that computes, and partitioned again after it

Master weights are float32. With bfloat16, autocast computes with rounded copies, as in the published code. DeepSpeed
partitions the concatenation of all parameters into flat pieces. Checkpoints do not depend on this: they get whole
tensors with canonical names, sharded along dim 0, so that one written here resumes on any number of ranks, and under
FSDP2.
"""

import logging
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from vjepa_scale.core import log
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.log import region
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed.engine import Engine, InitialValue, T, checked_start
from vjepa_scale.distributed.optim import (
    MOMENTS,
    GroupSetting,
    make_optimizer,
    named_parameters,
    set_rate,
    start_moments,
)
from vjepa_scale.distributed.prepare_blocks import prepare_blocks
from vjepa_scale.distributed.process_group import build_mesh
from vjepa_scale.model.init import initial_value
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.recipe.stage_sections import OptimizerConfig


class ZeroEngine(Engine):
    """One DeepSpeed engine for a composite of all trained networks; with stage 3 one more for each frozen network."""

    def __init__(self, cfg: EngineConfig, ranks: Ranks) -> None:
        super().__init__(cfg, ranks)
        self._deepspeed = _import_deepspeed(self.device, ranks)
        self._stage = cfg.zero_stage
        self._mesh = build_mesh("cpu", world_size=self.dp_world_size, replicate=1, timeout_s=cfg.timeout_s)
        self._frozen_engines: list[Any] = []  # references that keep their hooks alive
        self._named: dict[str, nn.Parameter] = {}
        self._engine: Any = None

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
        """Chooses kernels, checkpoints activations, then piece by piece: materialises, initialises, partitions."""
        self._accept(network, trainable=trainable)
        blocks = prepare_blocks(network, self._cfg, trainable=trainable)
        names = {id(parameter): f"{name}.{own}" for own, parameter in network.named_parameters()}
        for piece in [*blocks, network]:  # then at most one block is whole at a time
            self._materialise(piece, names, seed, initial_value)
        if self._stage == 3 and not trainable:
            engine, *_ = self._deepspeed.initialize(model=network, config=self._config(), dist_init_required=False)
            self._frozen_engines.append(engine)
        return network

    @torch.no_grad()
    def _materialise(self, piece: nn.Module, names: dict[int, str], seed: int, value: InitialValue) -> None:
        for module in piece.modules():
            for own, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    continue
                assert parameter.dtype == torch.float32, f"{own}: master weights are float32"
                full = checked_start(value, names[id(parameter)], parameter.shape, seed=seed)
                whole = nn.Parameter(full.to(self.device), requires_grad=parameter.requires_grad)
                setattr(module, own, whole)
        if self._stage == 3:
            self._deepspeed.zero.Init(module=piece, config_dict_or_path=self._config())

    def start_optimizer(
        self,
        cfg: OptimizerConfig,
        trained: Mapping[str, nn.Module],
        settings: Mapping[str, GroupSetting] | None = None,
        unreached: Collection[str] = (),
    ) -> None:
        self._named = {name: p for name, p in named_parameters(trained) if p.requires_grad}
        self._engine, self._zero, *_ = self._deepspeed.initialize(
            model=_Composite(trained, self.compute_type, self.device),
            optimizer=make_optimizer(cfg, self._named.items(), _whole_shape, settings, unreached),
            config=self._config(),
            dist_init_required=False,
        )
        self._optimizer = self._zero.optimizer
        self._moments = MOMENTS if cfg.kind == "adamw" else ()
        if self._moments:
            start_moments(
                self._optimizer,
                self._zero.fp32_partitioned_groups_flat
                if self._stage == 3
                else self._zero.single_partition_of_fp32_groups,
            )
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _config(self) -> dict[str, Any]:
        return {
            # Not used: this package decides batch sizes, and ``backward`` sets the accumulation boundary.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # DeepSpeed's default clips at 1.0. The training step clips, if the recipe sets a limit.
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
            "zero_optimization": {
                "stage": self._stage,
                "overlap_comm": self.device.type == "cuda",
                # Weights that stay gathered would not see what the EMA writes into their partitions.
                "stage3_param_persistence_threshold": 0,
                "stage3_model_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
            },
        }

    # -- what a training step needs -------------------------------------------------------------------

    def backward(self, loss: Callable[[], Tensor], *, share: float, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        shared = self._engine(loss) * share
        with region("backward"):
            self._engine.backward(shared, scale_wrt_gas=False)
        return shared.detach()

    @torch.no_grad()
    def evaluate(self, forward: Callable[[], T]) -> T:
        return self._engine(forward)

    def _gradients(self) -> dict[str, list[Tensor]]:
        # Stage 3 splits the optimiser's groups further.
        group_of = self._zero.sub_group_to_group_id if self._stage == 3 else {}
        gradients: dict[str, list[Tensor]] = {}
        for number, pieces in self._zero.averaged_gradients.items():
            if pieces:
                group = self._optimizer.param_groups[group_of.get(number, number)]["clip_group"]
                gradients.setdefault(group, []).extend(pieces)
        return gradients

    def discard_gradients(self) -> None:
        self._zero.averaged_gradients = {}
        self._zero.zero_grad()

    def step(self, lr: float) -> None:
        set_rate(self._zero, lr)
        self._engine.step()

    def match_ema(self, target: nn.Module, source: nn.Module) -> None:
        theirs = dict(source.named_parameters())
        assert theirs.keys() == dict(target.named_parameters()).keys(), "EMA: parameter names differ"
        for name, ours in target.named_parameters():
            assert not ours.requires_grad, f"EMA: {name} of the target is trained"
            assert _whole_shape(ours) == _whole_shape(theirs[name]), f"EMA: {name} has another shape"
            assert self._local(ours).shape == self._local(theirs[name]).shape, f"EMA: {name} is partitioned otherwise"

    @torch.no_grad()
    def ema_update(self, target: nn.Module, source: nn.Module, momentum: float) -> None:
        # Read at each update, because DeepSpeed may replace a parameter's tensor.
        averages = [self._local(parameter) for parameter in target.parameters()]
        torch._foreach_lerp_(averages, [self._local(parameter) for parameter in source.parameters()], 1.0 - momentum)

    def _local_weights(self, network: nn.Module) -> list[Tensor]:
        return [self._local(parameter) for parameter in network.parameters()]

    def _local(self, parameter: Any) -> Tensor:
        """Returns what this rank holds of a parameter, float32: all of it, or with stage 3 its flat piece."""
        if self._stage < 3:
            return parameter.data
        assert parameter.ds_status.name == "NOT_AVAILABLE", "a gathered weight hides what is written to its partition"
        return parameter.ds_tensor.data

    # -- what a checkpoint holds ----------------------------------------------------------------------

    gives_copies = True

    def tensors(self, networks: Mapping[str, nn.Module], *, optimizer: bool) -> dict[str, Tensor]:
        """Returns copies in CPU memory: each rank has its shard of every tensor."""
        state = {name: self._sharded(self._whole(p, self._local(p))) for name, p in named_parameters(networks)}
        if optimizer:
            for moment in self._moments:
                for name, parameter in self._named.items():
                    state[f"optimizer.{moment}.{name}"] = self._sharded(self._whole_moment(parameter, moment))
        return state

    @torch.no_grad()
    def restore(self, networks: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in named_parameters(networks):
            if name in tensors:
                self._put(parameter, _gathered(tensors[name], self.device), None)
        for moment in self._moments:
            for name, parameter in self._named.items():
                if (key := f"optimizer.{moment}.{name}") in tensors:
                    self._put(parameter, _gathered(tensors[key], self.device), moment)

    @torch.no_grad()
    def _sharded(self, whole: Tensor) -> Tensor:
        """Returns this rank's rows of a whole tensor. Copies only these to the CPU."""
        pieces = whole.chunk(self.dp_world_size)
        own = pieces[self.dp_rank] if self.dp_rank < len(pieces) else whole[:0]
        copy = own.to("cpu", copy=True)
        return DTensor.from_local(copy, self._mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())

    def _whole(self, parameter: Any, local: Tensor) -> Tensor:
        """Assembles a parameter, or a moment of it, from its pieces on all ranks. Collective."""
        if self._stage < 3:
            return local
        pieces = local.new_empty(self.dp_world_size * local.numel())
        dist.all_gather_into_tensor(pieces, local.contiguous())
        return pieces[: parameter.ds_numel].view(parameter.ds_shape)

    def _whole_moment(self, parameter: Any, moment: str) -> Tensor:
        if self._stage == 3:
            return self._whole(parameter, self._zero.get_local_fp32_param(parameter, moment))
        return parameter.get_full_hp_param(moment)

    def _put(self, parameter: Any, whole: Tensor, moment: str | None) -> None:
        """Writes a whole tensor into this rank's pieces: of the moment, or, with None, of the weight and its master."""
        if self._stage == 3:
            piece = parameter.ds_tensor.numel()
            flat = whole.flatten().new_zeros(self.dp_world_size * piece)
            flat[: whole.numel()] = whole.flatten()
            mine = flat[self.dp_rank * piece : (self.dp_rank + 1) * piece]
            if parameter.requires_grad:
                self._zero.set_local_hp_param(mine, parameter, moment)
            if moment is None:
                self._local(parameter).copy_(mine)
            return
        if parameter.requires_grad:
            parameter.set_full_hp_param(whole, moment)
        if moment is None:
            parameter.data.copy_(whole)


class _Composite(nn.Module):
    """All trained networks as one module. Its forward runs a function that computes a loss with them."""

    def __init__(self, networks: Mapping[str, nn.Module], compute_type: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self._device_type, self._compute_type = device.type, compute_type

    def forward(self, loss: Callable[[], T]) -> T:
        with torch.autocast(self._device_type, self._compute_type, enabled=self._compute_type != torch.float32):
            return loss()


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _gathered(tensor: Tensor, device: torch.device) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(device)


def _import_deepspeed(device: torch.device, ranks: Ranks) -> Any:
    """Imports DeepSpeed for this device, with its logging reduced. Raises UserError if it cannot be imported."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)  # DeepSpeed reads only this variable
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"DeepSpeed cannot be imported ({error})", where="engine.kind", fix="pip install 'vjepa_scale[deepspeed]'"
        ) from None
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    log.adopt()
    # An all-reduce for inference on CPUs that would be compiled now; gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
