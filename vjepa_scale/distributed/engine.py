"""The interface of an engine; ``fsdp.py`` and ``zero.py`` implement it with FSDP2 and DeepSpeed.

An engine owns everything that concerns all processes together: the shards of networks and optimiser, the averaging
of gradients, the EMA on shards, and the tensors of a checkpoint, with whole shapes and canonical names. Objectives,
the trainer and checkpoints therefore do not depend on the sharding.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed.attention_backend import set_kernel
from vjepa_scale.distributed.optim import GroupSetting, get_optimizer_steps, set_optimizer_steps, set_weight_decay
from vjepa_scale.distributed.process_group import pick_device
from vjepa_scale.model.init import initial_value
from vjepa_scale.recipe.schema import EngineConfig
from vjepa_scale.recipe.stage_sections import OptimizerConfig

T = TypeVar("T")

# Values per shard of a weight that ``weight_sample`` returns.
SAMPLED_WEIGHTS = 4096


class InitialValue(Protocol):
    """Returns the initial value of the parameter with a canonical name: float32, on the CPU."""

    def __call__(self, name: str, shape: torch.Size, *, seed: int) -> Tensor: ...


class Engine(ABC):
    """Shards networks over all processes of the started group. Every process is a data-parallel rank.

    The order of calls: ``shard`` for each network, ``match_ema``, ``start_optimizer``; ``restore`` if a checkpoint
    is loaded; then, per step, ``backward`` for each micro-batch, ``reduced``, ``step``, ``ema_update``.
    Master weights, optimiser state, EMA and the reduction of gradients are float32, whatever the compute type.
    """

    def __init__(self, cfg: EngineConfig, ranks: Ranks) -> None:
        self._cfg, self.ranks = cfg, ranks
        self.device = pick_device(cfg, ranks)
        self.dp_rank, self.dp_world_size = dist.get_rank(), dist.get_world_size()
        self.attention = ""  # the name of the kernel in use
        self._optimizer: torch.optim.Optimizer  # PyTorch's own, from start_optimizer on
        self._sampled: tuple[list[tuple[int, int]], Tensor] = ([], torch.zeros(0, device=self.device))
        # Of activations and matrix products.
        self.compute_type = torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32

    # -- from a plain network to a sharded one -------------------------------------------------------

    def _accept(self, network: nn.Module, *, trainable: bool) -> None:
        """Runs before any sharding: checks that the network can be initialised, and chooses the attention kernel."""
        assert all(parameter.is_meta for parameter in network.parameters()), "build the network on the meta device"
        assert not list(network.buffers()), "buffers are not initialised here: compute such tables in forward"
        if not trainable:  # a trained network keeps its flags: some layers have no gradient
            network.requires_grad_(False)
        self.attention = set_kernel(network, self._cfg.attention, device=self.device, dtype=self.compute_type)

    @abstractmethod
    def shard(
        self,
        network: nn.Module,
        *,
        name: str,
        seed: int,
        trainable: bool,
        initial_value: InitialValue = initial_value,
    ) -> nn.Module:
        """Shards, materialises and initialises a network. Returns the same module.

        network: built on the meta device, without buffers (they would not be initialised)
        name:    prefix of its parameters' canonical names, which key their initial values together with ``seed``.
                 Values do not depend on the number of processes; two networks of one architecture with one name
                 start equal.
        """

    def set_forward_order(self, networks: Sequence[nn.Module]) -> None:  # noqa: B027 (only FSDP2 has a use for it)
        """Sets the order in which every loss runs these networks, so that the next one's weights are gathered early."""

    @abstractmethod
    def match_ema(self, target: nn.Module, source: nn.Module) -> None:
        """Checks, before training, that ``ema_update`` can average these two networks shard by shard."""

    @abstractmethod
    def start_optimizer(
        self,
        cfg: OptimizerConfig,
        trained: Mapping[str, nn.Module],
        settings: Mapping[str, GroupSetting] | None = None,
        unreached: Collection[str] = (),
    ) -> None:
        """Creates the optimiser of these networks (by the prefix of their parameters' names). Once, after ``shard``.

        settings:  networks with their own learning rate and weight decay
        unreached: parameters that no loss reaches, by canonical name: they do not change
        """

    # -- what a training step needs -------------------------------------------------------------------

    @abstractmethod
    def backward(self, loss: Callable[[], Tensor], *, share: float, last: bool) -> Tensor:
        """Runs forward and backward of one micro-batch with weight ``share``. Returns ``share · loss``, detached.

        Gradients are averaged over ranks only in the last micro-batch of a step; before, each rank sums its own.
        """

    @torch.no_grad()
    def evaluate(self, forward: Callable[[], T]) -> T:
        """Runs ``forward`` as in training, without gradients, and returns its result. Collective."""
        return forward()

    def reduced(self, values: Tensor) -> tuple[list[float], dict[str, float]]:
        """Returns averages of float values over all ranks, and the L2 norms of the step's gradients by clip group.

        Norms are of whole networks. Results are equal on every rank. One collective, and one host synchronisation.
        """
        groups = list(dict.fromkeys(group["clip_group"] for group in self._optimizer.param_groups))
        squares = torch.zeros(len(groups), dtype=torch.float64, device=self.device)
        for group, gradients in self._gradients().items():
            squares[groups.index(group)] = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        both = torch.cat([values.detach().double() / self.dp_world_size, squares / self._gradient_copies])
        dist.all_reduce(both)
        summed = both.tolist()
        norms = [math.sqrt(square) for square in summed[len(values) :]]  # NaN and infinity stay what they are
        return summed[: len(values)], dict(zip(groups, norms, strict=True))

    def scale_gradients(self, factors: Mapping[str, float]) -> None:
        """Multiplies the gradients of some clip groups. Clipping is scaling by ``limit / norm`` if that is below 1.

        A factor of 0 sets gradients to zero, also those that are not finite.
        """
        for group, gradients in self._gradients().items():
            factor = factors.get(group, 1.0)
            if factor == 0:
                torch._foreach_zero_(gradients)
            elif factor != 1:
                torch._foreach_mul_(gradients, factor)

    @abstractmethod
    def _gradients(self) -> dict[str, list[Tensor]]:
        """Returns this rank's shards of the averaged gradients, by clip group, without empty ones."""

    # Number of ranks that hold each gradient.
    _gradient_copies = 1

    @abstractmethod
    def discard_gradients(self) -> None:
        """Discards the gradients of the step. Weights do not change."""

    @abstractmethod
    def step(self, lr: float) -> None:
        """Updates the weights by their gradients, then discards the gradients."""

    def set_weight_decay(self, weight_decay: float) -> None:
        """Sets the weight decay of the next steps for parameters with decay. Networks with settings keep theirs.

        ``start_optimizer`` must have had a weight decay above 0.
        """
        set_weight_decay(self._optimizer, weight_decay)

    @abstractmethod
    def ema_update(self, target: nn.Module, source: nn.Module, momentum: float) -> None:
        """θ̄ ← m·θ̄ + (1−m)·θ for all parameters of ``target`` (θ̄) and ``source`` (θ), in float32."""

    # -- what is measured at an interval ----------------------------------------------------------------

    @abstractmethod
    def _local_weights(self, network: nn.Module) -> list[Tensor]:
        """Returns what this rank holds of a network's parameters, in their order, float32. Not copies."""

    @torch.no_grad()
    def ema_distance(self, target: nn.Module, source: nn.Module) -> tuple[Tensor, Tensor]:
        """Returns squared L2 norms over this rank's shards: of the difference of two networks, and of ``source``.

        Every weight is held by equally many ranks, so the quotient of both sums over all ranks is exact.
        """
        pairs = list(zip(self._local_weights(target), self._local_weights(source), strict=True))
        pairs = [pair for pair in pairs if pair[0].numel()]
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for averages, weights in pairs:  # one by one: a difference of all of them would take as much memory as they do
            total += torch.stack([torch.linalg.vector_norm(each) for each in (averages - weights, weights)]).square()
        return total[0], total[1]

    @torch.no_grad()
    def weight_sample(self, networks: Iterable[nn.Module]) -> tuple[Tensor, Tensor]:
        """Returns evenly spaced values of this rank's shards [n], and how many values each stands for [n]."""
        values, sizes = [torch.zeros(0, device=self.device)], []
        for weights in (each for network in networks for each in self._local_weights(network) if each.numel()):
            values.append(weights.flatten()[:: -(-weights.numel() // SAMPLED_WEIGHTS)])
            sizes.append((len(values[-1]), weights.numel()))
        if sizes != self._sampled[0]:  # they do not change, and a copy to a GPU would wait for it
            counts = [torch.full((sampled,), whole / sampled, device=self.device) for sampled, whole in sizes]
            self._sampled = sizes, torch.cat([values[0], *counts])
        return torch.cat(values), self._sampled[1]

    def mean(self, x: Tensor) -> Tensor:
        """Returns the average of a float tensor over all ranks, equal on all of them, without gradient. Collective."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total.div_(self.dp_world_size)

    # -- what a checkpoint holds ----------------------------------------------------------------------

    # Whether ``tensors`` returns copies in CPU memory, or the state itself.
    gives_copies = False

    @abstractmethod
    def tensors(self, networks: Mapping[str, nn.Module], *, optimizer: bool) -> dict[str, Tensor]:
        """Returns the tensors of a checkpoint, as they are now: DTensors with canonical names and whole shapes.

        networks: by the prefix of their parameters' names
        optimizer: the moments of the trained networks too, as ``optimizer.<moment>.<parameter>``
        Collective. A loader writes into these tensors; then ``restore`` makes them the state of the run.
        """

    @abstractmethod
    def restore(self, networks: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
        """Sets the state from ``tensors``, which a loader has filled. Missing ones do not change. Collective."""

    @property
    def optimizer_steps(self) -> int:
        """Number of steps of the moments, for Adam's bias correction; 0 for SGD."""
        return get_optimizer_steps(self._optimizer)

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        set_optimizer_steps(self._optimizer, steps)


def checked_start(value: InitialValue, name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """Returns the initial value of a parameter, and asserts that it is float32, as master weights are."""
    full = value(name, shape, seed=seed)
    assert full.dtype == torch.float32, f"{name}: master weights are float32"
    return full


def build_engine(cfg: EngineConfig, ranks: Ranks) -> Engine:
    """Returns the engine of the recipe. Raises UserError if its library is not installed."""
    if cfg.kind == "deepspeed":
        from vjepa_scale.distributed.zero import ZeroEngine

        return ZeroEngine(cfg, ranks)
    from vjepa_scale.distributed.fsdp import FsdpEngine

    return FsdpEngine(cfg, ranks)
