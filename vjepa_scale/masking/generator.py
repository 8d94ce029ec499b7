"""The base class of mask generators, random subsets, and the masks of a recipe's generators.

To add one: write a file in this folder with its recipe section and its class, and add its line to ``MASK_GENERATORS``
in vjepa_scale/recipe/registry.py. Nothing here imports PyTorch, so that a launcher can check masks on a login node.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.rng import key64, mix64, words
from vjepa_scale.recipe.mask_sections import MasksConfig, MaskSection
from vjepa_scale.recipe.registry import MASK_GENERATORS, class_of

Grid = tuple[int, int, int]
Mask = npt.NDArray[np.bool_]
Ranks = npt.NDArray[np.uint64]

SectionT = TypeVar("SectionT", bound=MaskSection)


class MaskGenerator(ABC, Generic[SectionT]):
    """One entry of ``masks.generators``: draws which tokens of a clip are context and which are targets.

    section: class of its keys in a recipe
    config:  this entry's keys
    masks:   the whole ``masks`` section
    number:  index of this entry in ``masks.generators``; draws are keyed by it, and errors name it
    """

    section: type[SectionT]

    def __init__(self, config: SectionT, masks: MasksConfig, number: int) -> None:
        self.config, self.masks, self.number = config, masks, number

    @abstractmethod
    def draw(self, grid: Grid, *, seed: int, step: int, slots: range, group: range) -> tuple[Mask, Mask]:
        """Draws context and target tokens of each slot: bool [slots, t·h·w] each, disjoint.

        grid:  tokens (t, h, w) of a clip
        step:  the global step
        slots: consecutive slots of the step's global batch, all inside ``group``
        group: the mask group, whose clips share one number of context tokens and one of target tokens

        The draw of a slot depends only on these arguments, the recipe and ``number``: not on the other slots of a
        micro-batch, nor on the number of ranks.
        Raises UserError naming ``masks.generators.N`` where no context or target is left on this grid.
        """

    def check(self, grid: Grid) -> None:
        """Raises UserError naming ``masks.generators.N`` where ``draw`` could find no context or no target on a grid.

        Called for every grid of a stage before its first step.
        """
        return

    @classmethod
    def check_recipe(cls, config: SectionT, masks: MasksConfig, number: int) -> None:
        """Raises ValueError where an entry is incompatible with the other keys of ``masks``."""
        return

    @classmethod
    def hides_future(cls, entry: Mapping[str, Any]) -> bool:
        """Returns whether the context is always the past only, so that the mask token is trained to predict the future.

        entry: the keys in a checkpoint's recipe, possibly without defaults
        """
        return False

    @classmethod
    def describe(cls, entry: Mapping[str, Any]) -> str:
        """Describes an entry briefly, for the model card of an export. entry: as in ``hides_future``"""
        return f"kind {entry['kind']}"


def generator_class(kind: str) -> type[MaskGenerator[Any]]:
    """Returns the class registered for a kind. Raises KeyError for a kind without a line in ``MASK_GENERATORS``."""
    found: type[MaskGenerator[Any]] = class_of(MASK_GENERATORS, kind)
    return found


# -- random subsets --------------------------------------------------------------------------------


def random_ranks(seed: int, step: int, number: int, slots: range, items: int) -> Ranks:
    """Returns a random 64-bit rank for every item (token or time step) of every slot: uint64 [slots, items].

    Keyed by (seed, step, slot, number) alone.
    """
    row_keys = words(key64(seed, "mask.subset", step, number), len(slots), slots.start)
    return mix64(row_keys[:, None] ^ np.arange(items, dtype=np.uint64))


def subset(mask_BN: Mask, keep: int, ranks_BN: Ranks | None) -> Mask:
    """Keeps ``keep`` True items of each row: those of lowest rank, or the earliest where there are no ranks."""
    if ranks_BN is None:
        return mask_BN & (np.cumsum(mask_BN, axis=1, dtype=np.int32) <= keep)
    ranked_BN = np.where(mask_BN, ranks_BN, np.uint64(0xFFFFFFFFFFFFFFFF))
    return mask_BN & (ranked_BN <= np.partition(ranked_BN, keep - 1, axis=1)[:, keep - 1 : keep])


# -- all generators of a recipe --------------------------------------------------------------------


def drawn_masks(cfg: MasksConfig, *, seed: int, step: int, slots: range, grid: Grid) -> list[tuple[Mask, Mask]]:
    """Draws each generator's context and target tokens for slots of one mask group: bool [slots, t·h·w] each.

    The method needs lists of equal length in a batch, and the shortest list gets shorter as clips are added. So the
    global batch is cut into mask groups of consecutive slots, and the length of a list depends only on its own group,
    neither on the micro-batch nor on the number of ranks (method.md 4).

    step:  the global step
    slots: consecutive slots of the step's global batch, all inside one group of ``cfg.group``
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
    """Raises UserError naming ``masks.generators.N`` where a generator can leave no context or no target on a grid.

    Called before the first step.
    """
    for generator in _generators(cfg):
        generator.check(grid)


def _generators(cfg: MasksConfig) -> list[MaskGenerator[Any]]:
    return [generator_class(entry.kind)(entry, cfg, number) for number, entry in enumerate(cfg.generators)]
