"""The interface between the trainer and an objective: networks, loss, and what it reports.

A new objective (recipe/registry.py lists what else its kind needs) implements, in order:

    __init__          builds networks on the meta device and shards each by ``engine.shard``; see ``_frozen_encoder``
    trained           the networks that the optimiser updates; ``settings`` and ``unreached`` for their exceptions
    networks          all networks of a checkpoint; ``init_from`` loads those that the Stage's ``networks`` names, and
                      the others start fresh
    loss              of one micro-batch: its clips and ``batch.extras``; other scalars are written to metrics.jsonl
    after_step        such as the EMA of a target encoder
    checkpoint_facts  facts about its data for checkpoint manifests
    evaluation        if its Stage ``evaluates``
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.distributed.optim import GroupSetting
from vjepa_scale.eval.observation import Observation
from vjepa_scale.model.encoder import Encoder, PixelNormaliser
from vjepa_scale.recipe import Phase, Stage


class Objective(ABC):
    """Owns the networks of a stage, sharded by its engine.

    ema_momentum: of a target encoder; None without one
    """

    ema_momentum: float | None = None

    def __init__(self, stage: Stage, engine: Engine) -> None:
        self._recipe, self._engine = stage.recipe, engine
        augment = stage.recipe.data.augment
        self._pixels = PixelNormaliser(augment.mean, augment.std, engine.device)

    @property
    @abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """The networks that the optimiser updates, by the prefix of their parameters' names."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """All networks of a checkpoint, by the prefix of their parameters' names."""

    @property
    def settings(self) -> dict[str, GroupSetting]:
        """Trained networks with their own learning rate and weight decay."""
        return {}

    @property
    def unreached(self) -> frozenset[str]:
        """Parameters of trained networks that no loss reaches, by canonical name."""
        return frozenset()

    @abstractmethod
    def loss(self, batch: MicroBatch, observe: Observation | None = None) -> dict[str, Tensor]:
        """Returns float32 scalars of one micro-batch: ``loss``, with a graph, and others to report.

        observe: if given, features and losses of the micro-batch may be added to it
        """

    def observe_networks(self, observe: Observation) -> None:  # noqa: B027
        """Adds figures of the networks, at an interval, after a step's gradients and before its update."""

    def figures(self, reported: Mapping[str, float]) -> dict[str, float]:
        """Returns further columns of metrics.jsonl from the means over all ranks of what ``loss`` returned."""
        return {}

    def after_step(self) -> None:  # noqa: B027 (most have nothing to do)
        """Runs after each step of the optimiser."""

    def before_training(self, resumed: Mapping[str, Any] | None) -> None:  # noqa: B027
        """Runs once, after the weights are loaded. resumed: the manifest of the stage's own checkpoint, if any"""

    def before_phase(self, phase: Phase, stop_if_asked: Callable[[], None]) -> None:  # noqa: B027
        """Runs before a phase's first step. stop_if_asked: call it regularly, equally often on all ranks"""

    def checkpoint_facts(self) -> dict[str, Any]:
        """Returns facts about the stage's data for checkpoint manifests, as JSON under the kind's own keys."""
        return {}

    def evaluation(
        self, phases: Sequence[Phase], stop_if_asked: Callable[[], None]
    ) -> tuple[dict[str, Any], Iterator[str]] | None:
        """Evaluates after the last step, for a kind that ``evaluates``. Collective; returns None on ranks other than 0.

        phases: the stage's
        Returns the content of evaluation.json (``origin`` and ``step`` are added to it), and lines for a terminal.
        """
        raise NotImplementedError(f"{type(self).__name__} has no evaluation, though its Stage says that it evaluates")

    def _frozen_encoder(self) -> nn.Module:
        """Returns a sharded encoder without gradients."""
        with torch.device("meta"):
            encoder = Encoder(self._recipe.model)
        return self._engine.shard(encoder, name="encoder", seed=self._recipe.run.seed, trainable=False)

    def _normalised(self, clips: Tensor) -> Tensor:
        """uint8 [B, 3, T, H, W] in any memory layout → float32 on the device, by the recipe's mean and std."""
        return self._pixels(clips.to(self._engine.device, non_blocking=True))


def lp_distance(predicted: Tensor, wanted: Tensor, exponent: float) -> Tensor:
    """Returns the mean of |difference|^p / p: L1 for p = 1."""
    if exponent == 1.0:  # one operation, which keeps no difference for the backward pass
        return F.l1_loss(predicted, wanted)
    return (predicted - wanted).abs().pow(exponent).mean() / exponent


def normalised(tokens: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without parameters. The loss compares features after it."""
    return F.layer_norm(tokens, tokens.shape[-1:])
