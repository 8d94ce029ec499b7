"""Stages that train attentive probes on a frozen encoder. Networks and loss are in probe.py."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import MANIFEST, Manifest, few_labels, label_of, labels_of
from vjepa_scale.data.order import Ints
from vjepa_scale.model import flops
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.recipe.stage_sections import EXPORTED_PROBE_EPS, ProbeStageConfig

if TYPE_CHECKING:
    from vjepa_scale.data.batch import MicroBatch
    from vjepa_scale.data.clips import ClipRef
    from vjepa_scale.distributed.engine import Engine
    from vjepa_scale.objective.objective import Objective


class ProbeStage(Stage):
    """Trains classifiers on a frozen encoder's tokens and evaluates them at the end (docs/method.md 10)."""

    section = ProbeStageConfig
    networks = ("encoder",)
    evaluates = True
    trains_probes = True
    kept_defaults = ("eps",)
    config: ProbeStageConfig

    @property
    def decodes_clips(self) -> bool:
        """False if the tokens of all training clips are kept before the first step."""
        return not self.config.keep_tokens

    @property
    def evaluated_sets(self) -> tuple[str, ...]:
        return (self.config.evaluate_on,)

    @property
    def evaluated_frames(self) -> int:
        """T of the clips of the evaluation: the held-out data set's own, or the last phase's."""
        return self.recipe.data.sets[self.config.evaluate_on].frames or self.phases[-1].frames

    # -- checks --------------------------------------------------------------------------------------

    def check(self, source: object) -> None:
        super().check(source)
        key, probe, model = f"{source}:{self.name}", self.config, self.recipe.model
        if probe.evaluate_on not in self.recipe.data.sets:
            raise UserError(
                f"{probe.evaluate_on!r} is not in data.sets",
                where=f"{key}.evaluate_on",
                fix=f"known: {', '.join(self.recipe.data.sets)}",
            )
        for phase in self.phases:
            if probe.evaluate_on in phase.mixture:
                raise UserError(
                    f"{probe.evaluate_on!r} is trained on in phase {phase.name!r}: no clip of it would be held out",
                    where=f"{key}.evaluate_on",
                    fix=f"data.sets.{probe.evaluate_on}.weight: 0, or a {self.name}.mixture without it",
                )
        self.check_own_frames(probe.evaluate_on, source)
        if model.encoder.width % probe.heads:
            raise UserError(
                f"{probe.heads} heads do not divide the encoder's width {model.encoder.width}",
                where=f"{key}.heads",
                fix=f"the encoder's: {model.encoder.heads}",
            )

    @property
    def eps(self) -> float:
        """eps of the probes' LayerNorms."""
        return self.config.layer_norm_eps(self.recipe.model.encoder.heads)

    def warnings(self) -> list[str]:
        heads, of_encoder, name = self.config.heads, self.recipe.model.encoder.heads, self.name
        reasons, fix = [], []
        if heads != of_encoder:
            reasons.append(f"heads {heads}, theirs as many as the encoder: {of_encoder}")
            fix.append(f"{name}.heads={of_encoder}")
        if self.eps != EXPORTED_PROBE_EPS:
            reasons.append(f"eps {self.eps:g}, theirs {EXPORTED_PROBE_EPS:g}")
            fix += [f"{name}.eps={EXPORTED_PROBE_EPS:g}"] if self.config.eps is not None else []
        if not reasons:
            return []
        what = "its probes cannot be exported as VJEPA2ForVideoClassification"
        return [f"{what}: {'; '.join(reasons)} (before training: {' '.join(fix)})"]

    def decisive(self) -> dict[str, Any]:
        whole = super().decisive()
        return {self.name: whole[self.name] | {"eps": self.eps}}

    # -- which records ---------------------------------------------------------------------------------

    def task(self, manifests: Mapping[str, Manifest]) -> Manifest:
        """Returns the data set that defines the classes: the first that the probes are trained on."""
        return manifests[next(iter(self.phases[0].mixture))]

    def records(self, manifests: Mapping[str, Manifest]) -> dict[str, Ints]:
        """Returns the training records: ``labels_per_class`` of each class, for each of ``label_draws``."""
        drawn = {name for phase in self.phases for name in phase.mixture}
        return {name: self._trained_on(name, manifests) for name in manifests if name in drawn}

    def _trained_on(self, name: str, manifests: Mapping[str, Manifest]) -> Ints:
        task, held_out = self.task(manifests), self.config.evaluate_on
        if len(task.classes) < 2:
            raise UserError(
                f"{len(task.classes)} class{'es' * (len(task.classes) != 1)}: a probe needs at least two",
                where=task.folder / MANIFEST,
                fix="a data set with at least two classes",
            )
        if manifests[name].identity == manifests[held_out].identity:
            raise UserError(
                f"the same shards as data.sets.{held_out}, on which the probes are evaluated",
                where=f"data.sets.{name}.path: {manifests[name].folder}",
                fix="held-out videos of their own",
            )
        for needed in (name, held_out):
            labels_of(manifests[needed], task.classes)  # raises if one is missing or not a class of the task
        chosen_on = self.choice_records(manifests[name])
        found = self._few(manifests[name], per_class=self._trained_per_class)
        return found if self.config.labels_per_class else np.setdiff1d(found, chosen_on)

    @property
    def _trained_per_class(self) -> int | None:
        """Training records of each class, over all draws; None: all."""
        few = self.config.labels_per_class
        return None if few is None else few * self.config.label_draws

    def records_of_draw(self, manifest: Manifest, draw: int) -> Ints:
        """Returns the records of one draw of labels. Without ``labels_per_class`` there is one draw, of all records."""
        per_class = self.config.labels_per_class
        return self._few(manifest, per_class=per_class, skip=draw * (per_class or 0))

    def choice_records(self, manifest: Manifest) -> Ints:
        """Returns the records of a training set that choose the setting and are not trained on; empty by default."""
        if self.config.choose_per_class is None:
            return np.arange(0)
        return self._few(manifest, per_class=self.config.choose_per_class, skip=self._trained_per_class or 0)

    def _few(self, manifest: Manifest, *, per_class: int | None, skip: int = 0) -> Ints:
        """Returns ``per_class`` records of each class, drawn by ``data.seed``; None: all."""
        labels = labels_of(manifest)
        if per_class is None:
            return np.arange(manifest.records)
        try:
            return few_labels(
                labels, per_class=per_class, seed=self.recipe.data.seed, skip=skip, classes=manifest.classes
            )
        except ValueError as error:
            name = self.name
            fix = f"fewer {name}.labels_per_class, {name}.label_draws or {name}.choose_per_class, or more videos"
            raise UserError(str(error), where=manifest.folder / MANIFEST, fix=fix) from None

    # -- what a micro-batch has --------------------------------------------------------------------------

    def prepared(self, phase: Phase, manifests: Mapping[str, Manifest]) -> dict[str, Ints] | None:
        """Returns, for several draws of labels, the draw of each record of each data set; -1: in none."""
        if self.config.label_draws == 1:
            return None
        numbers = {name: np.full(manifests[name].records, -1, np.int64) for name in phase.mixture}
        for name, of_records in numbers.items():
            for draw in range(self.config.label_draws):
                of_records[self.records_of_draw(manifests[name], draw)] = draw
        return numbers

    def complete(
        self,
        batch: "MicroBatch",
        shown: Sequence["ClipRef"],
        phase: Phase,
        manifests: Mapping[str, Manifest],
        prepared: Mapping[str, Ints] | None,
    ) -> "MicroBatch":
        """Adds ``labels``, int64 [b], and for several draws of labels ``label_draws``, int64 [b]."""
        import torch

        classes = self.task(manifests).classes
        extras = {"labels": torch.tensor([label_of(manifests[ref.dataset], ref.record, classes) for ref in shown])}
        if prepared is not None:
            draws = [int(prepared[ref.dataset][ref.record]) for ref in shown]
            extras["label_draws"] = torch.tensor(draws)
        return replace(batch, records=tuple(ref.record for ref in shown), extras=extras)

    def beside_clips(self, frames: int, size: tuple[int, int]) -> tuple[int, int]:
        """Of labels and draws, int64."""
        tensors = 1 if self.config.label_draws == 1 else 2
        return tensors, 8 * tensors

    def finish_batch(self) -> tuple[int, int, tuple[int, int]]:
        """Returns the batches of the evaluation, which hold all views of a record."""
        views, last = self.config.views.segments * self.config.views.crops, self.phases[-1]
        return max(views, last.micro_batch), self.evaluated_frames, last.size

    # -- cost, training ----------------------------------------------------------------------------------

    def clip_flops(self, phase: Phase, frames: int) -> float:
        """Does not count the probes' last layers: the number of classes is not in the recipe."""
        t, h, w = phase.grid(patch=self.recipe.model.patch, tubelet=self.recipe.model.tubelet, frames=frames)
        probes = len(self.config.lr_scales) * len(self.config.weight_decays)
        return flops.probe_step(
            self.recipe.model,
            t * h * w,
            probes=probes,
            depth=self.config.depth,
            classes=0,
            encoded=self.decodes_clips,
        )

    def objective(
        self, engine: "Engine", manifests: Mapping[str, Manifest], records: Mapping[str, Ints]
    ) -> "Objective":
        from vjepa_scale.objective.probe import Probes

        return Probes(self, engine, manifests, records)
