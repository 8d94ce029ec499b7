"""A stage as an object: its recipe, its phases, its folders, and everything that depends on its kind of training.

Launchers, monitors and trainers make it once, by ``stages_of(recipe)[name]``, and pass it on. A kind of training is a
subclass in objective/ with a line in recipe/registry.py. Does not import PyTorch.

The files of a run:

    <run>/recipe.yaml               the resolved recipe of the last launch
    <run>/ledger.jsonl              clips that were replaced, and stops; empty if there were none
    <run>/launches/0001/            one launch: recipe, git state, Slurm's scripts
    <run>/code/<hash>/vjepa_scale/  the code that the jobs run
    <run>/<stage>/history.jsonl     submitted, started, saved, interrupted, failed, done
    <run>/<stage>/metrics.jsonl     a row per step
    <run>/<stage>/evaluations.jsonl a row per evaluated checkpoint (recipe section evaluate)
    <run>/<stage>/evaluation.json   of a kind that evaluates (probes): such a stage is finished when this file exists
    <run>/<stage>/checkpoints/, logs/JOB_RANK_log.{out,err}, failures/JOB.RANK.json, rendezvous/
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json
from vjepa_scale.recipe.evaluate_section import check_evaluate
from vjepa_scale.recipe.networks import Network
from vjepa_scale.recipe.phases import Phase, phase_steps
from vjepa_scale.recipe.registry import DEFAULT_KINDS, STAGES, class_of, kind_of
from vjepa_scale.recipe.schedules import check_schedules, in_steps, peak_weight_decay, schedules_of
from vjepa_scale.recipe.schema import DataConfig, LaunchConfig, Recipe
from vjepa_scale.recipe.stage_sections import OptimizerConfig, StageConfig

if TYPE_CHECKING:  # types of the methods that the kinds of training implement
    from vjepa_scale.data.batch import MicroBatch
    from vjepa_scale.data.clips import ClipRef
    from vjepa_scale.data.manifest import Manifest
    from vjepa_scale.data.order import Ints
    from vjepa_scale.distributed.engine import Engine
    from vjepa_scale.model.memory import ClipWork
    from vjepa_scale.objective.objective import Objective

CHECKPOINTS, LOGS, FAILURES, EVALUATION = "checkpoints", "logs", "failures", "evaluation.json"
EVALUATIONS = "evaluations.jsonl"
# A stage's name is used for a folder, a job and an item of --stages; a run has these other folders.
_NAME, _FOLDERS_OF_RUNS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*"), ("launches", "code")

# A value of ``init_from``: a randomly initialised encoder, for comparison.
UNTRAINED = "untrained"


class Stage(ABC):
    """One stage of a run.

    recipe, name, config: the whole recipe, the stage's name in it, and its own section
    earlier:              the stages of the recipe before it, by name

    A subclass has what must work without an engine and without PyTorch; its ``objective`` has networks and loss.
    """

    section: ClassVar[type[StageConfig]] = StageConfig  # the schema of its keys
    networks: ClassVar[tuple[Network, ...]]  # the networks of the model that it uses
    has_target_encoder: ClassVar[bool] = False  # if not, it starts from the target encoder as its encoder
    evaluates: ClassVar[bool] = False  # after its last step, by its objective's ``evaluation``
    trains_probes: ClassVar[bool] = False  # the best one can be exported as a classifier
    # Keys whose default differed in an earlier version: a run that has begun keeps its recorded value.
    kept_defaults: ClassVar[tuple[str, ...]] = ()
    # The name of the groups of slots with one geometry that the global batch consists of, and their key.
    group_words: ClassVar[tuple[str, str]] = ("micro-batches", "micro_batch")

    def __init__(self, recipe: Recipe, name: str, earlier: Mapping[str, Stage]) -> None:
        self.recipe, self.name, self.earlier = recipe, name, dict(earlier)
        self.config: Any = recipe.stages()[name]

    # -- what the recipe says ------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        return kind_of(self.name, self.config.kind)

    @property
    def starts_by(self) -> str | None:
        """The key that it has: ``continue_from``, ``init_from``, or None."""
        return "continue_from" if self.config.continue_from else "init_from" if self.config.init_from else None

    @property
    def starts_from(self) -> str | None:
        """The value of that key: a stage of the recipe, or a path."""
        return self.config.continue_from or self.config.init_from

    @property
    def optimizer(self) -> OptimizerConfig:
        """Its own, or the recipe's."""
        return self.config.optimizer or self.recipe.optimizer

    @property
    def launch(self) -> LaunchConfig:
        """The recipe's ``launch`` with the stage's overrides."""
        own = self.config.launch
        return self.recipe.launch if own is None else self.recipe.launch.model_copy(update=own.given())

    @property
    def world_size(self) -> int:
        return self.launch.nodes * self.launch.tasks_per_node

    @property
    def data(self) -> DataConfig:
        """The ``data`` section that its clips are drawn by."""
        return self.recipe.data

    @cached_property
    def phases(self) -> list[Phase]:
        """Its phases by the recipe alone: from the end of the stage that it continues from, else from step 0."""
        return self.phases_from(None)

    def phases_from(self, first: int | None) -> list[Phase]:
        """Returns its phases for a start at this global step, without phases of 0 steps (from a small fraction).

        Raises ValueError for phases that do not add up, or that have no learning rate.
        """
        config, recipe = self.config, self.recipe
        start_lr: float | None = None
        if config.continue_from in self.earlier:
            before = self.earlier[config.continue_from].phases[-1]
            start_lr = before.last_lr
            first = before.end if first is None else first
        first = first or 0
        weight_decay, ema_momentum = schedules_of(self, first)
        phases = []
        for given, steps in zip(config.phases, phase_steps(config), strict=True):
            begin_lr = given.start_lr if given.start_lr is not None else start_lr
            if begin_lr is None:
                raise ValueError(f"{given.name!r} has no start_lr, and there is no phase before it to take it from")
            final_lr = given.final_lr if given.final_lr is not None else begin_lr
            if steps == 0:
                start_lr = final_lr
                continue
            mixture = given.mixture or config.mixture or {name: s.weight for name, s in recipe.data.sets.items()}
            frames = (given.clip and given.clip.frames) or config.clip.frames
            micro_batch = given.micro_batch or config.micro_batch
            phases.append(
                Phase(
                    stage=self.name,
                    name=given.name,
                    first=first,
                    steps=steps,
                    start_lr=begin_lr,
                    final_lr=final_lr,
                    lr_shape=given.lr_shape,
                    lr_horizon=None if given.lr_horizon is None else in_steps(given.lr_horizon, steps),
                    weight_decay_ramp=weight_decay.of_phase(given.weight_decay, first, steps),
                    ema_ramp=ema_momentum.of_phase(given.ema_momentum, first, steps),
                    frames=frames,
                    size=(given.clip and given.clip.size) or config.clip.size,
                    global_batch=given.global_batch or config.global_batch,
                    micro_batch=micro_batch,
                    mixture={name: weight for name, weight in mixture.items() if weight > 0},
                    own_frames={
                        name: data_set.frames
                        for name, data_set in recipe.data.sets.items()
                        if data_set.frames not in (None, frames) and mixture.get(name, 0) > 0
                    },
                    mask_group=self.group(micro_batch),
                )
            )
            start_lr = phases[-1].last_lr
            first += steps
        return phases

    def optimizer_at_start(self, phases: Sequence[Phase]) -> OptimizerConfig:
        """Returns ``optimizer`` with the largest weight decay of a schedule, so that groups with decay exist."""
        peak = peak_weight_decay(phases)
        return self.optimizer if peak is None else self.optimizer.model_copy(update={"weight_decay": peak})

    def group(self, micro_batch: int) -> int:
        """Returns the number of consecutive slots of a step that have one geometry."""
        return micro_batch

    @property
    def decodes_clips(self) -> bool:
        """Whether its steps decode clips from videos."""
        return True

    @property
    def evaluated_sets(self) -> tuple[str, ...]:
        """Data sets that it needs in addition to those that it trains on."""
        return ()

    @property
    def data_sets(self) -> list[str]:
        """The data sets that it needs, in the recipe's order."""
        needed = {*self.evaluated_sets, *(name for phase in self.phases for name in phase.mixture)}
        return [name for name in self.recipe.data.sets if name in needed]

    @property
    def networks_at_start(self) -> list[Network]:
        """The networks that it loads from ``starts_from``: its ``networks`` without those of ``init_without``."""
        without = self.config.init_without if self.config.init_from else ()
        return [network for network in self.networks if network not in without]

    # -- its files ---------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.dir) / self.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def logs(self) -> Path:
        return self.folder / LOGS

    @property
    def failures(self) -> Path:
        return self.folder / FAILURES

    @property
    def evaluation(self) -> Path:
        return self.folder / EVALUATION

    @property
    def evaluations(self) -> Path:
        return self.folder / EVALUATIONS

    # -- checks: each raises UserError naming a key ------------------------------------------------------

    def check(self, source: object) -> None:
        """Checks the stage's keys against each other and other sections. source: errors name it before the key."""
        key = f"{source}:{self.name}"
        if not _NAME.fullmatch(self.name) or self.name in _FOLDERS_OF_RUNS:
            raise UserError(
                f"{self.name!r} cannot be a stage's name, which is that of a folder of the run",
                where=key,
                fix=f"letters, digits, - and _, but not {' or '.join(_FOLDERS_OF_RUNS)}",
            )
        for word in ("continue_from", "init_from"):
            value = getattr(self.config, word)
            if value in {*self.recipe.stages(), *DEFAULT_KINDS} and value not in self.earlier:
                raise UserError(
                    f"{value!r} is no earlier stage of this recipe",
                    where=f"{key}.{word}",
                    fix="name an earlier stage or a checkpoint folder",
                )
        before = self.earlier.get(str(self.config.continue_from))
        if before is not None and before.kind != self.kind:
            raise UserError(
                f"{before.name!r} has another objective: {self.name} cannot continue from it",
                where=f"{key}.continue_from",
                fix="init_from, which takes its weights",
            )
        check_schedules(self, key)
        try:
            phases = self.phases
        except ValueError as error:
            raise UserError(str(error), where=f"{key}.phases", fix="change steps of the stage or of a phase") from None
        for phase in phases:
            self.check_clips(phase, source)
            self._check_phase(phase, key)

    def check_clips(self, phase: Phase, source: object) -> None:
        """Checks that clips of a phase fit the networks: whole tubelets."""
        key, tubelet = f"{source}:{self.name}", self.recipe.model.tubelet
        if phase.frames % tubelet:
            raise UserError(
                f"{phase.frames} frames do not divide into tubelets of {tubelet}", where=f"{key}.clip.frames"
            )
        for name in phase.own_frames:
            self.check_own_frames(name, source)

    def check_own_frames(self, data_set: str, source: object) -> None:
        """Checks that the clips of a data set with its own length are whole tubelets."""
        frames, tubelet = self.recipe.data.sets[data_set].frames or 0, self.recipe.model.tubelet
        if frames % tubelet:
            raise UserError(
                f"{frames} frames do not divide into tubelets of {tubelet}",
                where=f"{source}:data.sets.{data_set}.frames",
                fix=f"a multiple of model.tubelet ({tubelet})",
            )

    def _check_phase(self, phase: Phase, key: str) -> None:
        patch, group = self.recipe.model.patch, phase.mask_group
        if phase.size[0] % patch or phase.size[1] % patch:
            raise UserError(
                f"{phase.size[0]}×{phase.size[1]} pixels do not divide into patches of {patch}",
                where=f"{key}.clip.size",
            )
        if group % phase.micro_batch:
            raise UserError(
                f"a micro-batch of {phase.micro_batch} does not divide the mask group of {group} slots",
                where=f"{key}.micro_batch",
                fix=f"a divisor of masks.group ({group})",
            )
        if phase.global_batch % group:
            parts, size = self.group_words
            raise UserError(
                f"a global batch of {phase.global_batch} clips does not divide into {parts} of {group}",
                where=f"{key}.global_batch",
                fix=f"a multiple of {size} ({group})",
            )
        for name in phase.mixture:
            if name not in self.recipe.data.sets:
                raise UserError(
                    f"{name!r} is not in data.sets",
                    where=f"{key}.mixture",
                    fix=f"known: {', '.join(self.recipe.data.sets)}",
                )
        if not phase.mixture:
            raise UserError("every weight is 0: nothing to draw from", where=f"{key}.mixture")

    def check_before_launch(self) -> None:  # noqa: B027 (most have nothing to check)
        """Checks that take too long for each reading of a recipe."""

    def warnings(self) -> list[str]:
        """Returns warnings for the plan: about values that are allowed but may be unintended."""
        return []

    # -- its data --------------------------------------------------------------------------------------

    @property
    def draws_some_records(self) -> bool:
        """Whether its kind draws from a subset of the records of its data sets."""
        return type(self).records is not Stage.records

    def records(self, manifests: Mapping[str, Manifest]) -> dict[str, Ints]:
        """Returns the records that it draws from: ascending record numbers by data set; of a missing data set, all.

        Every rank computes the same. Raises UserError naming the key of a data set that the stage cannot use.
        """
        return {}

    def prepared(self, phase: Phase, manifests: Mapping[str, Manifest]) -> Any:
        """Returns an argument of ``complete``, computed once per phase and sent to the loader's workers."""
        return None

    @property
    def squashed_aspect(self) -> tuple[float, float] | None:
        """Range of width/height: a clip is the largest centred crop within it, squashed to its size. None: random crops
        (``data.augment``)."""
        return None

    @abstractmethod
    def complete(
        self,
        batch: MicroBatch,
        shown: Sequence[ClipRef],
        phase: Phase,
        manifests: Mapping[str, Manifest],
        prepared: Any,
    ) -> MicroBatch:
        """Returns a micro-batch with its other inputs, such as masks or labels. shown: the source of each clip"""

    def beside_clips(self, frames: int, size: tuple[int, int]) -> tuple[int, int]:
        """Returns what ``complete`` adds to a micro-batch: the number of tensors, and their bytes per clip."""
        return 0, 0

    def finish_batch(self) -> tuple[int, int, tuple[int, int]] | None:
        """Returns clips, frames and size of the batches of the evaluation after the last step; None without one."""
        return None

    # -- cost --------------------------------------------------------------------------------------------

    @abstractmethod
    def clip_flops(self, phase: Phase, frames: int) -> float:
        """Returns the model FLOPs of one optimiser step for one clip of so many frames."""

    def step_flops(self, phase: Phase) -> float:
        """Returns the model FLOPs of one optimiser step over all ranks: the mean over the phase's geometries."""
        total = sum(phase.mixture.values())
        return phase.global_batch * sum(
            self.clip_flops(phase, frames) * sum(part.values()) / total for frames, part in phase.geometries.items()
        )

    def clip_work(self, phase: Phase, frames: int) -> ClipWork | None:
        """Returns what a clip of a micro-batch computes and keeps in a large step, for the estimate; None: unknown."""
        return None

    def clip_tokens(self, phase: Phase, frames: int) -> int:
        """Returns the number of tokens of a clip of so many frames."""
        t, h, w = phase.grid(patch=self.recipe.model.patch, tubelet=self.recipe.model.tubelet, frames=frames)
        return t * h * w

    def tokens_in_words(self, phase: Phase, frames: int) -> str:
        """Returns that number as text."""
        return str(self.clip_tokens(phase, frames))

    # -- training ----------------------------------------------------------------------------------------

    @abstractmethod
    def objective(self, engine: Engine, manifests: Mapping[str, Manifest], records: Mapping[str, Ints]) -> Objective:
        """Returns its objective: initialised, sharded networks and the loss. records: of ``records``"""

    def decisive(self) -> dict[str, Any]:
        """Returns the recipe's values that all its steps depend on, besides those of every stage, as JSON."""
        whole = self.config.model_dump(mode="json")
        return {self.name: {key: value for key, value in whole.items() if key not in StageConfig.model_fields}}

    def is_complete(self, step: int) -> bool:
        """Returns whether its evaluation, if it has one, is finished too. step: of its last checkpoint"""
        if not self.evaluates:
            return True
        try:
            result = read_json(self.evaluation)
        except UserError:  # absent or damaged: it is evaluated again
            return False
        return isinstance(result, dict) and result.get("step") == step


def stages_of(recipe: Recipe) -> dict[str, Stage]:
    """Returns the stages of a recipe, in the order in which they run."""
    stages: dict[str, Stage] = {}
    for name, config in recipe.stages().items():
        stages[name] = class_of(STAGES, kind_of(name, config.kind))(recipe, name, stages)
    return stages


def check_stages(recipe: Recipe, source: object) -> None:
    """Checks the keys of stages against each other and other sections. Raises UserError naming ``source:key``."""
    if not recipe.stages():
        raise UserError("no stage to run", where=source, fix="add a section pretrain:, cooldown:, action: or probe:")
    stages = stages_of(recipe)
    for stage in stages.values():
        stage.check(source)
    if recipe.evaluate is not None:
        check_evaluate(stages, recipe.evaluate, source)
