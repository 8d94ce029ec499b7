"""Attentive probes on a frozen encoder's tokens (V-JEPA 2 paper, section 5; docs/method.md 10)."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.distributed.optim import GroupSetting
from vjepa_scale.eval.attentive_probe import ProbeEvaluation, keep_tokens, table
from vjepa_scale.eval.observation import Observation
from vjepa_scale.model.encoder import pooled
from vjepa_scale.model.init import probe_initial_value
from vjepa_scale.model.probe import probe_of
from vjepa_scale.objective.objective import Objective
from vjepa_scale.objective.probe_stage import ProbeStage
from vjepa_scale.recipe import Phase

_log = logging.getLogger(__name__)


class Probes(Objective):
    """One frozen encoder, and a probe for each draw of labels, learning rate and weight decay.

    The probes of a draw learn only from its clips. One pass of the encoder gives the tokens for all probes. The loss is
    the sum of the probes' cross-entropies, so each probe gets only its own gradient. A probe that diverges because of
    its learning rate does not affect the others: losses and gradients that are not finite are excluded.

    kept: tokens [N, D] of training clips, by data set and record number; either empty, or complete for all training
          clips, and then the encoder is not called
    """

    def __init__(
        self, stage: ProbeStage, engine: Engine, manifests: Mapping[str, Manifest], records: Mapping[str, Ints]
    ) -> None:
        super().__init__(stage, engine)
        self._stage, self._manifests, self._records = stage, manifests, records
        recipe, config, classes = stage.recipe, stage.config, stage.task(manifests).classes
        self._kept_of: object = None  # the geometry of the clips whose tokens are kept
        self.encoder = self._frozen_encoder()
        self.kept: dict[tuple[str, int], Tensor] = {}
        self._draws = config.label_draws
        every = product(range(self._draws), config.lr_scales, config.weight_decays)
        self._settings = {}
        self.draw_of: dict[str, int] = {}
        for number, (draw, lr_scale, weight_decay) in enumerate(every):
            name = f"probe_{number:02d}"
            self._settings[name], self.draw_of[name] = GroupSetting(lr_scale, weight_decay), draw
        self.probes: dict[str, nn.Module] = {}
        for name in self._settings:
            with torch.device("meta"):
                probe = probe_of(recipe.model, config, classes=len(classes))
            start = partial(probe_initial_value, depth=config.depth, width=recipe.model.encoder.width)
            # One name for all: they start equal and differ only by their settings.
            self.probes[name] = engine.shard(
                probe, name="probe", seed=recipe.run.seed, trainable=True, initial_value=start
            )

    @property
    def trained(self) -> dict[str, nn.Module]:
        return self.probes

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, **self.probes}

    @property
    def settings(self) -> dict[str, GroupSetting]:
        return self._settings

    def loss(self, batch: MicroBatch, observe: Observation | None = None) -> dict[str, Tensor]:
        """Returns the sum over the probes; ``best_loss``, of the best setting; ``accuracy``, the mean over the probes.

        Probes with a loss that is not finite are left out, unless all are. With D draws of labels a probe's loss is the
        sum over its own clips times D, divided by the number of all clips: its mean over micro-batches is the mean over
        its clips.
        """
        device = self._engine.device
        labels_B = batch.extras["labels"].to(device, non_blocking=True)
        tokens_BND = self._tokens(batch)
        rows = [rows.to(device, non_blocking=True) for rows in self._rows_of_draws(batch)]
        losses, right = [], []
        for name, probe in self.probes.items():
            own = rows[self.draw_of[name]]
            # Every rank must call every probe. Without clips of its draw it passes another clip, which does not count.
            shown = own if len(own) else torch.zeros(1, dtype=torch.int64, device=device)
            logits = probe(tokens_BND[shown]).float()[: len(own)]
            share = self._draws / len(labels_B)
            losses.append(F.cross_entropy(logits, labels_B[own], reduction="sum") * share)
            right.append((logits.argmax(1) == labels_B[own]).float().sum() * share)
        loss, correct = torch.stack(losses), torch.stack(right)
        lost = ~loss.detach().isfinite()
        counted = loss.where(~lost | lost.all(), 0.0)  # other probes' gradients do not change
        by_setting = loss.detach().where(~lost, torch.inf).view(self._draws, -1).mean(0)
        return {"loss": counted.sum(), "best_loss": by_setting.min(), "accuracy": correct.where(~lost, 0.0).mean()}

    def _tokens(self, batch: MicroBatch) -> Tensor:
        """Returns the tokens of a micro-batch's clips: [B, N, D]."""
        if self.kept:
            kept = [self.kept[clip] for clip in zip(batch.datasets, batch.records, strict=True)]
            return torch.stack(kept).to(self._engine.device, non_blocking=True)
        with torch.no_grad():
            return self.encoder(self._normalised(batch.clips))

    def _rows_of_draws(self, batch: MicroBatch) -> list[Tensor]:
        """Returns the indices of a micro-batch's clips that belong to each draw of labels."""
        of_clips = batch.extras.get("label_draws")
        if of_clips is None:
            return [torch.arange(len(batch.clips))]
        return [(of_clips == draw).nonzero().squeeze(1) for draw in range(self._draws)]

    # -- before and after the steps --------------------------------------------------------------------

    def before_phase(self, phase: Phase, stop_if_asked: Callable[[], None]) -> None:
        """With ``keep_tokens``: encodes the phase's training clips, unless the phase before had the same clips."""
        geometry = phase.geometries, phase.size
        if self._stage.decodes_clips or geometry == self._kept_of:
            return
        self.kept = keep_tokens(
            self._stage, self.encode, self._engine, self._manifests, self._records, phase, stop_if_asked
        )
        self._kept_of = geometry
        if process_group.is_main():
            _log.info(f"{self._stage.name}: the tokens of {len(self.kept)} clips are kept: steps do not encode them")

    def evaluation(
        self, phases: Sequence[Phase], stop_if_asked: Callable[[], None]
    ) -> tuple[dict[str, Any], Iterator[str]] | None:
        evaluation = ProbeEvaluation(
            self._stage, self, self._engine, self._manifests, self._records, phases[-1], stop_if_asked
        )
        peak_lr = max(max(phase.start_lr, phase.final_lr) for phase in phases)
        result = evaluation.result(step=phases[-1].end, peak_lr=peak_lr)
        return None if result is None else (result, table(result))

    def encode(self, clips: Tensor) -> Tensor:
        """Returns tokens [B, N, D] of uint8 clips [B, 3, T, H, W]. Collective, because it gathers weights."""
        return self._engine.evaluate(lambda: self.encoder(self._normalised(clips)))

    def evaluate(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates uint8 clips [B, 3, T, H, W] without gradients. Collective, because it gathers weights.

        Returns logits of the P probes, float32 [B, P, classes], and features: tokens averaged over space
        (knn_linear.encoder_features), float32 [B, T/tubelet · D].
        """

        def forward() -> tuple[Tensor, Tensor]:
            tokens_BND = self.encoder(self._normalised(clips))
            logits = [probe(tokens_BND).float() for probe in self.probes.values()]
            times = clips.shape[2] // self._recipe.model.tubelet
            return torch.stack(logits, 1), pooled(tokens_BND.float(), times)

        return self._engine.evaluate(forward)
