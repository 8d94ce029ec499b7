"""The masks of some slots of a step, by every generator of the recipe, and the check of a recipe's generators.

The method wants lists of equal length in a batch, and the shortest list gets shorter as clips are added.
So the global batch is cut into mask groups of consecutive slots, and every list has a length that its own group
decides: lengths depend neither on the micro-batch nor on the number of ranks (method.md 4).
"""

from typing import Any

from vjepa_scale.masking.generator import Grid, Mask, MaskGenerator, generator_class
from vjepa_scale.recipe.mask_sections import MasksConfig


def drawn_masks(cfg: MasksConfig, *, seed: int, step: int, slots: range, grid: Grid) -> list[tuple[Mask, Mask]]:
    """Context and target tokens of each generator for consecutive slots of one mask group: bool [slots, t·h·w] each.

    step:  the global step
    slots: of the step's global batch, all inside one group of ``cfg.group``
    grid:  tokens (t, h, w) of a clip
    Raises UserError naming ``masks.generators.N`` where no context or target is left on this grid.
    """
    first = slots.start // cfg.group * cfg.group
    assert first <= slots.start < slots.stop <= first + cfg.group, (
        f"{slots} is not inside one mask group of {cfg.group}"
    )
    group = range(first, first + cfg.group)
    return [generator.draw(grid, seed=seed, step=step, slots=slots, group=group) for generator in _generators(cfg)]


def check_masks(cfg: MasksConfig, *, grid: Grid) -> None:
    """Refuse, before the first step, generators that can leave no context or no target on a grid.

    Raises UserError naming ``masks.generators.N``.
    """
    for generator in _generators(cfg):
        generator.check(grid)


def _generators(cfg: MasksConfig) -> list[MaskGenerator[Any]]:
    return [generator_class(entry.kind)(entry, cfg, number) for number, entry in enumerate(cfg.generators)]
