"""Stages of action-conditioned post-training on robots' trajectories. Networks and loss are in action.py."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import as_called
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.data.trajectories import long_enough, trajectory_clip
from vjepa_scale.model import flops
from vjepa_scale.model.memory import FLOAT32, ClipWork, Pass
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.recipe.schema import CHANNELS, DataConfig
from vjepa_scale.recipe.stage_sections import ActionStageConfig

if TYPE_CHECKING:
    from vjepa_scale.data.batch import MicroBatch
    from vjepa_scale.data.clips import ClipRef
    from vjepa_scale.distributed.engine import Engine
    from vjepa_scale.objective.objective import Objective


class ActionStage(Stage):
    """Learns how a robot's actions change the features of a frozen encoder (docs/method.md 8)."""

    section = ActionStageConfig
    networks = ("encoder", "action_predictor")
    config: ActionStageConfig

    @property
    def data(self) -> DataConfig:
        """The ``data`` section with sampling by time and without jitter: actions are differences over time."""
        augment = self.recipe.data.augment.model_copy(update={"rate": (1.0, 1.0)})
        return self.recipe.data.model_copy(update={"sampling": "time", "augment": augment})

    def check_clips(self, phase: Phase, source: object) -> None:
        """Checks that clips are longer than a rollout. Each frame is repeated to one tubelet, so any number fits."""
        if (frames := min(phase.geometries)) <= self.config.rollout_steps:
            raise UserError(
                f"a rollout of {self.config.rollout_steps} steps needs more than {frames} frames",
                where=f"{source}:{self.name}.clip.frames",
                fix="longer clips, or fewer rollout_steps",
            )

    def records(self, manifests: Mapping[str, Manifest]) -> dict[str, Ints]:
        """Returns the trajectories that are at least as long as the longest clip."""
        longest = self._longest_clips()
        return {name: self._long_enough(name, manifests[name], longest[name]) for name in manifests if name in longest}

    def _longest_clips(self) -> dict[str, int]:
        """Returns the frames of the longest clips that the phases draw from each data set."""
        return {
            name: max(phase.frames_of(name) for phase in self.phases if name in phase.mixture)
            for name in self.data_sets
        }

    def _long_enough(self, name: str, manifest: Manifest, frames: int) -> Ints:
        fix = as_called("make shards with tools/make_shards.py DROID OUT --trajectories droid")
        where = f"data.sets.{name}.path: {manifest.folder}"
        if "states.size" not in manifest.described:
            raise UserError("these shards have no trajectories", where=where, fix=fix)
        found = long_enough(manifest, frames=frames, fps=self.recipe.data.fps_of(name))
        fixes = {"states": fix}
        if self.recipe.model.action_predictor.extrinsics:
            fixes["extrinsics"] = "model.action_predictor.extrinsics=false, or a data set in which all have them"
        for member, fix in fixes.items():
            column = f"{member}.size"
            sizes = manifest.column(column)[found] if column in manifest.described else np.zeros(len(found))
            if lacking := int((sizes == 0).sum()):
                what = f"{lacking} of its {len(found)} trajectories that are long enough have no {member}"
                raise UserError(what, where=where, fix=fix)
        return found

    @property
    def squashed_aspect(self) -> tuple[float, float]:
        """``crop_aspect``: no random crop, since it would change the effect of an action on the picture."""
        return self.config.crop_aspect

    def complete(
        self,
        batch: "MicroBatch",
        shown: Sequence["ClipRef"],
        phase: Phase,
        manifests: Mapping[str, Manifest],
        prepared: None,
    ) -> "MicroBatch":
        """Adds ``states``, float32 [b, T, 7], of the clips' frames; ``extrinsics``, [b, T, 6], if the model has it."""
        import torch

        clips = [trajectory_clip(manifests[ref.dataset], ref) for ref in shown]
        extras = {"states": torch.from_numpy(np.stack([clip.states for clip in clips]))}
        if self.recipe.model.action_predictor.extrinsics:
            cameras = [clip.extrinsics for clip in clips if clip.extrinsics is not None]
            assert len(cameras) == len(clips), "checked by ``records``"
            extras["extrinsics"] = torch.from_numpy(np.stack(cameras))
        return replace(batch, extras=extras)

    def beside_clips(self, frames: int, size: tuple[int, int]) -> tuple[int, int]:
        """Of states and extrinsics, float32."""
        extrinsics = int(self.recipe.model.action_predictor.extrinsics)
        return 1 + extrinsics, 4 * frames * (7 + 6 * extrinsics)

    def clip_flops(self, phase: Phase, frames: int) -> float:
        _, h, w = phase.grid(patch=self.recipe.model.patch, tubelet=self.recipe.model.tubelet, frames=frames)
        return flops.action_step(self.recipe.model, frames, h * w, self.config.rollout_steps)

    def clip_work(self, phase: Phase, frames: int) -> ClipWork:
        model = self.recipe.model
        _, h, w = phase.grid(patch=model.patch, tubelet=model.tubelet, frames=frames)
        conditions = 3 if model.action_predictor.extrinsics else 2
        steps = [frames - 1, *range(2, self.config.rollout_steps + 1)]  # of each pass of the predictor
        return ClipWork(
            (
                # The encoder computes all frames of a micro-batch as one batch.
                Pass("encoder", frames * h * w, trained=False),
                *(
                    Pass("action_predictor", n * (h * w + conditions), given=n * h * w, predicted=n * h * w)
                    for n in steps
                ),
            ),
            # The encoder repeats each frame to fill a tubelet.
            pixels=CHANNELS * frames * model.tubelet * phase.size[0] * phase.size[1],
            # Features before and after LayerNorm, predictions after it, and their targets.
            kept=FLOAT32 * model.encoder.width * h * w * (2 * frames + 2 * sum(steps)),
        )

    def clip_tokens(self, phase: Phase, frames: int) -> int:
        _, h, w = phase.grid(patch=self.recipe.model.patch, tubelet=self.recipe.model.tubelet, frames=frames)
        return frames * h * w

    def tokens_in_words(self, phase: Phase, frames: int) -> str:
        _, h, w = phase.grid(patch=self.recipe.model.patch, tubelet=self.recipe.model.tubelet, frames=frames)
        return f"{frames} × {h * w}"

    def objective(
        self, engine: "Engine", manifests: Mapping[str, Manifest], records: Mapping[str, Ints]
    ) -> "Objective":
        from vjepa_scale.objective.action import ActionConditioned

        return ActionConditioned(self, engine, manifests, records)

    def decisive(self) -> dict[str, Any]:
        """Adds the longest clips: ``records`` depends on them from the first step on."""
        return super().decisive() | {"the longest clip of a data set, in frames": self._longest_clips()}
