"""What a step of a phase costs, before it is trained."""

from vjepa_scale.masking import drawn_masks
from vjepa_scale.model import flops
from vjepa_scale.recipe import Phase, Recipe

# Lengths change from step to step; the mean over this many is within a few percent of a long run's.
SAMPLED_STEPS = 16


def step_flops(recipe: Recipe, phase: Phase) -> float:
    """Model FLOPs of one optimiser step over all ranks: the mean over sampled steps' masks and over geometries.

    Of probes, without their last layers, whose number of classes the data say.
    """
    total = sum(phase.mixture.values())
    return phase.global_batch * sum(
        _clip_flops(recipe, phase, frames) * sum(part.values()) / total for frames, part in phase.geometries.items()
    )


def _clip_flops(recipe: Recipe, phase: Phase, frames: int) -> float:
    """Of one clip of so many frames."""
    t, h, w = phase.grid(patch=recipe.model.patch, tubelet=recipe.model.tubelet, frames=frames)
    if recipe.action is not None and phase.kind == "action":
        return flops.action_step(recipe.model, frames, h * w, recipe.action.rollout_steps)
    if recipe.probe is not None and phase.kind == "probe":
        probes = len(recipe.probe.lr_scales) * len(recipe.probe.weight_decays)
        encoded, depth = not recipe.probe.keep_tokens, recipe.probe.depth
        return flops.probe_step(recipe.model, t * h * w, probes=probes, depth=depth, classes=0, encoded=encoded)
    total = 0
    for step in range(phase.first, phase.first + SAMPLED_STEPS):
        drawn = drawn_masks(recipe.masks, seed=recipe.run.seed, step=step, slots=range(1), grid=(t, h, w))
        lengths = [(int(context.sum()), int(target.sum())) for context, target in drawn]
        total += flops.jepa_step(recipe.model, t * h * w, lengths)
    return total / SAMPLED_STEPS
