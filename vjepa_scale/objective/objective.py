"""What the trainer asks of an objective: its networks, its loss, and what it reports.

A new one (recipe/registry.py says what else its kind needs) has, in order:

    __init__          builds networks on the meta device and shards each by ``engine.shard``; ``_frozen_encoder`` is one
    trained           those that the optimiser moves; ``settings`` and ``unreached``, what is particular to some
    networks          all that a checkpoint holds; by ``init_from`` a stage takes those that its Stage names in
                      ``networks``, and others start fresh
    loss              of one micro-batch, with ``batch.extras`` beside its clips; other scalars go into metrics.jsonl
    after_step        such as the EMA of a target encoder
    checkpoint_facts  what a manifest says of its data
    evaluation        where its Stage ``evaluates``
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
from vjepa_scale.eval.effective_rank import FeatureCovariance
from vjepa_scale.model.encoder import Encoder, PixelNormaliser
from vjepa_scale.recipe import Phase, Stage


class Objective(ABC):
    """Owns the networks of a stage, sharded by its engine.

    observes:     whether ``loss`` gives features to look at for a collapse
    ema_momentum: of a target encoder; None without one
    """

    observes = False
    ema_momentum: float | None = None

    def __init__(self, stage: Stage, engine: Engine) -> None:
        self._recipe, self._engine = stage.recipe, engine
        augment = stage.recipe.data.augment
        self._pixels = PixelNormaliser(augment.mean, augment.std, engine.device)

    @property
    @abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """The networks that the optimiser moves, by the prefix of their parameters' names."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Everything a checkpoint holds."""

    @property
    def settings(self) -> dict[str, GroupSetting]:
        """Trained networks that have a learning rate and a weight decay of their own."""
        return {}

    @property
    def unreached(self) -> frozenset[str]:
        """Parameters of trained networks that no loss reaches, by canonical name."""
        return frozenset()

    @abstractmethod
    def loss(self, batch: MicroBatch, observe: FeatureCovariance | None = None) -> dict[str, Tensor]:
        """Of one micro-batch, float32 scalars: ``loss``, with a graph, and what is reported beside it.

        observe: where given, takes features of the micro-batch
        """

    def after_step(self) -> None:  # noqa: B027 (most have nothing to do)
        """What follows each step of the optimiser."""

    def before_training(self, resumed: Mapping[str, Any] | None) -> None:  # noqa: B027
        """Once, when all weights are there. resumed: the manifest of the stage's own checkpoint, if there is one."""

    def before_phase(self, phase: Phase, stop_if_asked: Callable[[], None]) -> None:  # noqa: B027
        """Before a phase's first step. stop_if_asked: to be called now and then, by all ranks equally often"""

    def checkpoint_facts(self) -> dict[str, Any]:
        """What checkpoints say of the stage's data, as JSON under keys of the kind's own."""
        return {}

    def evaluation(
        self, phases: Sequence[Phase], stop_if_asked: Callable[[], None]
    ) -> tuple[dict[str, Any], Iterator[str]] | None:
        """After the last step, of a kind that ``evaluates``. Collective; returns None on all ranks but rank 0.

        phases: the stage's
        Returns evaluation.json's content (``origin`` and ``step`` are added to it), and lines for a terminal.
        """
        raise NotImplementedError(f"{type(self).__name__} has no evaluation, though its Stage says that it evaluates")

    def _frozen_encoder(self) -> nn.Module:
        """The encoder, without gradients; one copy."""
        with torch.device("meta"):
            encoder = Encoder(self._recipe.model)
        return self._engine.shard(encoder, name="encoder", seed=self._recipe.run.seed, trainable=False)

    def _normalised(self, clips: Tensor) -> Tensor:
        """uint8 [B, 3, T, H, W] in any memory layout → float32 on the device, by the recipe's mean and std."""
        return self._pixels(clips.to(self._engine.device, non_blocking=True))


def lp_distance(predicted: Tensor, wanted: Tensor, exponent: float) -> Tensor:
    """Mean |difference|^p / p: L1 for p = 1."""
    if exponent == 1.0:  # in one operation: no difference is kept for the backward pass
        return F.l1_loss(predicted, wanted)
    return (predicted - wanted).abs().pow(exponent).mean() / exponent


def normalised(tokens: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without parameters: what predictions and their targets are compared in."""
    return F.layer_norm(tokens, tokens.shape[-1:])
