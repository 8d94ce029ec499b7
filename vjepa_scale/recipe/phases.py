"""Stages become phases: stretches of the global step with everything about them decided.

Steps are counted from 0; a phase covers ``first <= step < end`` of the global step, which never resets:
a cooldown's phases count from the step of the checkpoint that it continues from.
"""

from dataclasses import dataclass, field
from typing import Literal

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.schema import Recipe
from vjepa_scale.recipe.stage_sections import ActionStageConfig, ProbeStageConfig, StageConfig

STAGES = ("pretrain", "cooldown", "action", "probe")
MASKED = ("pretrain", "cooldown")  # those that learn from masks


Kind = Literal["jepa", "action", "probe"]


def kind_of(stage_name: str) -> Kind:
    """What a stage's steps learn from: masked clips, trajectories, or labelled clips."""
    return "action" if stage_name == "action" else "probe" if stage_name == "probe" else "jepa"


@dataclass(frozen=True)
class Phase:
    """One stretch of steps.

    first, steps:  the global steps first … first+steps-1
    frames, size:  T and (H, W) of a clip, in frames and pixels
    mixture:       weight of each data set that is drawn from (all positive)
    own_frames:    T of those data sets whose clips have another length
    mask_group:    consecutive slots of one geometry; matters where there are several
    """

    stage: str
    name: str
    first: int
    steps: int
    start_lr: float
    final_lr: float
    frames: int
    size: tuple[int, int]
    global_batch: int
    micro_batch: int
    mixture: dict[str, float]
    own_frames: dict[str, int] = field(default_factory=dict)
    mask_group: int = 1

    @property
    def end(self) -> int:
        return self.first + self.steps

    @property
    def kind(self) -> Kind:
        """Its stage's."""
        return kind_of(self.stage)

    def lr(self, step: int) -> float:
        """The learning rate of a global step: a linear ramp whose last step has exactly final_lr.

        lr(s) = start + (final − start)·(s − first + 1)/steps; a constant phase has start = final.
        """
        if not self.first <= step < self.end:
            raise ValueError(f"step {step} is not in phase {self.name} ({self.first} to {self.end - 1})")
        done = step - self.first + 1
        if done == self.steps:  # exactly, whatever the rounding of the formula
            return self.final_lr
        return self.start_lr + (self.final_lr - self.start_lr) * done / self.steps

    def frames_of(self, name: str) -> int:
        """T of a data set's clips."""
        return self.own_frames.get(name, self.frames)

    @property
    def geometries(self) -> dict[int, dict[str, float]]:
        """The part of the mixture that has each number of frames; data sets in the mixture's order."""
        parts: dict[int, dict[str, float]] = {}
        for name, weight in self.mixture.items():
            parts.setdefault(self.frames_of(name), {})[name] = weight
        return parts

    def grid(self, *, patch: int, tubelet: int, frames: int | None = None) -> tuple[int, int, int]:
        """Tokens (t, h, w) of a clip of so many frames, by default the phase's."""
        return (self.frames if frames is None else frames) // tubelet, self.size[0] // patch, self.size[1] // patch


def resolve_phases(recipe: Recipe, stage_name: str, *, first: int | None = None) -> list[Phase]:
    """The phases of a stage on the global step.

    first: the step the stage starts from; by default the end of the stage of this recipe that it
           continues from, else 0. Phases of no steps (a fraction too small) are left out.
    """
    stage = recipe.stages()[stage_name]
    start_lr: float | None = None
    if stage.continue_from in recipe.stages():
        before = resolve_phases(recipe, stage.continue_from)[-1]
        start_lr = before.final_lr
        first = before.end if first is None else first
    first = first or 0
    phases = []
    for config, steps in zip(stage.phases, _phase_steps(stage), strict=True):
        begin_lr = config.start_lr if config.start_lr is not None else start_lr
        if begin_lr is None:
            raise ValueError(f"{config.name!r} has no start_lr, and no phase before it to go on from")
        start_lr = config.final_lr if config.final_lr is not None else begin_lr
        if steps == 0:
            continue
        mixture = config.mixture or stage.mixture or {name: s.weight for name, s in recipe.data.sets.items()}
        frames = (config.clip and config.clip.frames) or stage.clip.frames
        phases.append(
            Phase(
                stage=stage_name,
                name=config.name,
                first=first,
                steps=steps,
                start_lr=begin_lr,
                final_lr=start_lr,
                frames=frames,
                size=(config.clip and config.clip.size) or stage.clip.size,
                global_batch=config.global_batch or stage.global_batch,
                micro_batch=config.micro_batch or stage.micro_batch,
                mixture={name: weight for name, weight in mixture.items() if weight > 0},
                own_frames={
                    name: data_set.frames
                    for name, data_set in recipe.data.sets.items()
                    if data_set.frames not in (None, frames) and mixture.get(name, 0) > 0
                },
                mask_group=recipe.masks.group if stage_name in MASKED else config.micro_batch or stage.micro_batch,
            )
        )
        first += steps
    return phases


def _phase_steps(stage: StageConfig) -> list[int]:
    """Steps of each phase; raises ValueError where they do not add up to the stage's."""
    fixed = [
        None if p.steps is None else p.steps if isinstance(p.steps, int) else round(p.steps * stage.steps)
        for p in stage.phases
    ]
    rest = stage.steps - sum(n for n in fixed if n is not None)
    open_phases = fixed.count(None)
    if open_phases > 1:
        raise ValueError("only one phase may leave out steps")
    if rest < 0 or (open_phases == 0 and rest != 0):
        raise ValueError(f"phases take {stage.steps - rest} steps, the stage has {stage.steps}")
    return [rest if n is None else n for n in fixed]


def check_stages(recipe: Recipe, source: object) -> None:
    """Everything about stages that needs more than one key. Raises UserError naming ``source:key``."""
    if not recipe.stages():
        raise UserError("no stage to run", where=source, fix="add a section pretrain:, cooldown:, action: or probe:")
    names = list(recipe.stages())
    for name, stage in recipe.stages().items():
        key = f"{source}:{name}"
        for word in ("continue_from", "init_from"):
            value = getattr(stage, word)
            if value in STAGES and value not in names[: names.index(name)]:
                raise UserError(
                    f"{value!r} is no earlier stage of this recipe",
                    where=f"{key}.{word}",
                    fix="name an earlier stage or a checkpoint folder",
                )
        if stage.continue_from in STAGES and name not in MASKED:
            raise UserError(
                f"{stage.continue_from!r} has another objective: nothing of {name} can go on from it",
                where=f"{key}.continue_from",
                fix="init_from, which takes its weights",
            )
        try:
            phases = resolve_phases(recipe, name)
        except ValueError as error:
            raise UserError(str(error), where=f"{key}.phases", fix="change steps of the stage or of a phase") from None
        for phase in phases:
            _check_phase(recipe, phase, key)
    if recipe.probe is not None:
        _check_probe(recipe, recipe.probe, f"{source}:probe")


def stage_sets(recipe: Recipe, stage_name: str) -> list[str]:
    """The data sets that a stage needs, in the recipe's order."""
    needed = {name for phase in resolve_phases(recipe, stage_name) for name in phase.mixture}
    if stage_name == "probe" and recipe.probe is not None:
        needed.add(recipe.probe.evaluate_on)
    return [name for name in recipe.data.sets if name in needed]


def _check_probe(recipe: Recipe, probe: ProbeStageConfig, key: str) -> None:
    if probe.evaluate_on not in recipe.data.sets:
        raise UserError(
            f"{probe.evaluate_on!r} is not in data.sets",
            where=f"{key}.evaluate_on",
            fix=f"known: {', '.join(recipe.data.sets)}",
        )
    for phase in resolve_phases(recipe, "probe"):
        if probe.evaluate_on in phase.mixture:
            raise UserError(
                f"{probe.evaluate_on!r} is trained on in phase {phase.name!r}: no clip of it would be held out",
                where=f"{key}.evaluate_on",
                fix=f"data.sets.{probe.evaluate_on}.weight: 0, or a probe.mixture without it",
            )
    if (frames := recipe.data.sets[probe.evaluate_on].frames or 0) % recipe.model.tubelet:
        raise UserError(
            f"{frames} frames do not divide into tubelets of {recipe.model.tubelet}",
            where=f"{key.rpartition(':')[0]}:data.sets.{probe.evaluate_on}.frames",
            fix=f"a multiple of model.tubelet ({recipe.model.tubelet})",
        )
    if recipe.model.encoder.width % probe.heads:
        raise UserError(
            f"{probe.heads} heads do not divide the encoder's width {recipe.model.encoder.width}",
            where=f"{key}.heads",
            fix=f"the encoder's: {recipe.model.encoder.heads}",
        )


def _check_phase(recipe: Recipe, phase: Phase, key: str) -> None:
    model, group = recipe.model, phase.mask_group
    if phase.kind == "action":  # each frame is a step, repeated to one tubelet
        wanted = recipe.stages()["action"]
        assert isinstance(wanted, ActionStageConfig)
        if (frames := min(phase.geometries)) <= wanted.rollout_steps:
            raise UserError(
                f"a rollout of {wanted.rollout_steps} steps needs more than {frames} frames",
                where=f"{key}.clip.frames",
                fix="longer clips, or fewer rollout_steps",
            )
    elif phase.frames % model.tubelet:
        raise UserError(
            f"{phase.frames} frames do not divide into tubelets of {model.tubelet}", where=f"{key}.clip.frames"
        )
    else:
        _check_own_frames(recipe, phase, key)
    if phase.size[0] % model.patch or phase.size[1] % model.patch:
        raise UserError(
            f"{phase.size[0]}×{phase.size[1]} pixels do not divide into patches of {model.patch}",
            where=f"{key}.clip.size",
        )
    if group % phase.micro_batch:
        raise UserError(
            f"a micro-batch of {phase.micro_batch} does not divide the mask group of {group} slots",
            where=f"{key}.micro_batch",
            fix=f"a divisor of masks.group ({group})",
        )
    if phase.global_batch % group:
        parts, size = ("mask groups", "masks.group") if phase.stage in MASKED else ("micro-batches", "micro_batch")
        raise UserError(
            f"a global batch of {phase.global_batch} clips does not divide into {parts} of {group}",
            where=f"{key}.global_batch",
            fix=f"a multiple of {size} ({group})",
        )
    for name in phase.mixture:
        if name not in recipe.data.sets:
            raise UserError(
                f"{name!r} is not in data.sets", where=f"{key}.mixture", fix=f"known: {', '.join(recipe.data.sets)}"
            )
    if not phase.mixture:
        raise UserError("every weight is 0: nothing to draw from", where=f"{key}.mixture")


def _check_own_frames(recipe: Recipe, phase: Phase, key: str) -> None:
    for name, frames in phase.own_frames.items():
        if frames % recipe.model.tubelet:
            raise UserError(
                f"{frames} frames do not divide into tubelets of {recipe.model.tubelet}",
                where=f"{key.rpartition(':')[0]}:data.sets.{name}.frames",
                fix=f"a multiple of model.tubelet ({recipe.model.tubelet})",
            )


def accumulation(phase: Phase, *, dp_world_size: int) -> int:
    """Micro-batches per rank and step. Raises UserError where the ranks do not divide them."""
    micro_batches = phase.global_batch // phase.micro_batch
    if micro_batches % dp_world_size:
        raise UserError(
            f"{phase.global_batch} clips in micro-batches of {phase.micro_batch} are {micro_batches}, "
            f"which {dp_world_size} ranks cannot share equally",
            where=f"{phase.stage}.global_batch",
            fix=f"other launch.nodes × launch.tasks_per_node, or a multiple of micro_batch × ranks = "
            f"{phase.micro_batch * dp_world_size}",
        )
    return micro_batches // dp_world_size
