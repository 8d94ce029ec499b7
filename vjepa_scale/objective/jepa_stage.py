"""Stages of masked prediction: pretraining and cooldown. Networks and loss are in jepa.py."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.masking import check_masks, drawn_masks
from vjepa_scale.model import flops
from vjepa_scale.model.memory import FLOAT32, ClipWork, Pass
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.recipe.schema import CHANNELS

if TYPE_CHECKING:
    from vjepa_scale.data.batch import MicroBatch
    from vjepa_scale.data.clips import ClipRef
    from vjepa_scale.distributed.engine import Engine
    from vjepa_scale.objective.objective import Objective

# Lengths of masks change from step to step. The mean over this many steps is within a few percent of a long run's.
SAMPLED_STEPS = 16


class JepaStage(Stage):
    """Learns to predict the features of masked tokens of clips."""

    networks = ("encoder", "predictor")
    has_target_encoder = True
    group_words = ("mask groups", "masks.group")

    def group(self, micro_batch: int) -> int:
        return self.recipe.masks.group

    def check_before_launch(self) -> None:
        """Checks that no mask generator can leave a clip without context or target."""
        for phase in self.phases:
            for frames in phase.geometries:
                check_masks(self.recipe.masks, grid=self._grid(phase, frames))

    def complete(
        self,
        batch: "MicroBatch",
        shown: Sequence["ClipRef"],
        phase: Phase,
        manifests: Mapping[str, Manifest],
        prepared: None,
    ) -> "MicroBatch":
        """Adds the masks."""
        from vjepa_scale.data.batch import draw_masks

        masks = draw_masks(
            self.recipe.masks,
            seed=self.recipe.run.seed,
            step=batch.step,
            slots=batch.slots,
            grid=self._grid(phase, batch.clips.shape[2]),
        )
        return replace(batch, masks=masks)

    def beside_clips(self, frames: int, size: tuple[int, int]) -> tuple[int, int]:
        """Of context and target of each mask generator: together at most all tokens once, in int64."""
        model, generators = self.recipe.model, len(self.recipe.masks.generators)
        tokens = max(1, frames // model.tubelet) * (size[0] // model.patch) * (size[1] // model.patch)
        return 2 * generators, 8 * generators * tokens

    def clip_flops(self, phase: Phase, frames: int) -> float:
        """Returns the mean over the masks of the phase's first steps."""
        t, h, w = self._grid(phase, frames)
        pairs = self._pairs(range(phase.first, phase.first + SAMPLED_STEPS), phase, frames)
        return sum(flops.jepa_step(self.recipe.model, t * h * w, lengths) for lengths in pairs) / SAMPLED_STEPS

    def clip_work(self, phase: Phase, frames: int) -> ClipWork:
        """Returns the work with the largest masks of some steps, the same steps for all phases of a geometry.

        Not a bound: with V-JEPA 2's masks on 2048 tokens one step in a hundred has more context, in 4,000 steps by
        up to 15 %.
        """
        t, h, w = self._grid(phase, frames)
        sampled = self._pairs(range(2 * SAMPLED_STEPS), phase, frames)
        pairs = max(sampled, key=lambda pairs: sum(context for context, _ in pairs))
        passes = [Pass("encoder", t * h * w, trained=False)]
        for context, target in pairs:
            passes += [
                Pass("encoder", context, given=context),
                Pass("predictor", context + target, given=context, predicted=target),
            ]
        # All target features, before and after LayerNorm, and the targets of each pair.
        features = 2 * t * h * w + sum(target for _, target in pairs)
        return ClipWork(
            tuple(passes),
            pixels=CHANNELS * frames * phase.size[0] * phase.size[1],
            kept=FLOAT32 * self.recipe.model.encoder.width * features,
        )

    def _pairs(self, steps: range, phase: Phase, frames: int) -> list[list[tuple[int, int]]]:
        """Returns the numbers of context and target tokens of each mask generator, for each of the steps."""
        cfg, seed, grid = self.recipe.masks, self.recipe.run.seed, self._grid(phase, frames)
        if (steps, grid) not in self._sampled:
            drawn = (drawn_masks(cfg, seed=seed, step=step, slots=range(1), grid=grid) for step in steps)
            self._sampled[steps, grid] = [
                [(int(context.sum()), int(target.sum())) for context, target in pairs] for pairs in drawn
            ]
        return self._sampled[steps, grid]

    @cached_property
    def _sampled(self) -> dict[tuple[range, tuple[int, int, int]], list[list[tuple[int, int]]]]:
        return {}

    def objective(
        self, engine: "Engine", manifests: Mapping[str, Manifest], records: Mapping[str, Ints]
    ) -> "Objective":
        from vjepa_scale.objective.jepa import Jepa

        return Jepa(self, engine)

    def decisive(self) -> dict[str, Any]:
        whole = self.recipe.model_dump(mode="json")
        return {section: whole[section] for section in ("masks", "jepa")}

    def _grid(self, phase: Phase, frames: int) -> tuple[int, int, int]:
        return phase.grid(patch=self.recipe.model.patch, tubelet=self.recipe.model.tubelet, frames=frames)
