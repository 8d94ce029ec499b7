"""Which tokens of some slots are context and which target, in equal numbers within a mask group.

The method wants lists of equal length in a batch, and the shortest list gets shorter as clips are added.
So the global batch is cut into mask groups of consecutive slots, and every list is cut to the minimum of
its own group: lengths depend neither on the micro-batch nor on the number of ranks (method.md 4).
Masks of whole time steps have equal lengths to begin with.
"""

from vjepa_scale.masking.blocks import Grid, block_size, drawn_block_size, union_of_blocks
from vjepa_scale.masking.frames import check_frames, frame_masks
from vjepa_scale.masking.subset import Mask, Ranks, random_ranks, subset
from vjepa_scale.recipe.mask_sections import BlockMasksConfig, MasksConfig


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
    pairs = []
    for number, generator in enumerate(cfg.generators):
        if isinstance(generator, BlockMasksConfig):
            context, target = _block_masks(
                generator, cfg, grid, seed=seed, step=step, number=number, slots=slots, group=group
            )
        else:
            context, target = frame_masks(generator, grid, seed=seed, step=step, number=number, slots=slots)
        pairs.append((context, target))
    return pairs


def check_masks(cfg: MasksConfig, *, grid: Grid) -> None:
    """Refuse, before the first step, generators that can leave no context or no target on a grid.

    Of blocks, tries the largest at seventeen aspect ratios over the configured range.
    """
    for number, generator in enumerate(cfg.generators):
        if not isinstance(generator, BlockMasksConfig):
            check_frames(generator, grid, number=number)
            continue
        for i in range(17):
            size = block_size(generator, grid, temporal=1.0, spatial=1.0, aspect=i / 16)
            union_of_blocks(generator, grid, size, seed=0, step=i, number=number, slots=range(cfg.group))


def _block_masks(
    generator: BlockMasksConfig,
    cfg: MasksConfig,
    grid: Grid,
    *,
    seed: int,
    step: int,
    number: int,
    slots: range,
    group: range,
) -> tuple[Mask, Mask]:
    """Context and target tokens of each slot, with the lengths of its group: bool [slots, t·h·w] each."""
    size = drawn_block_size(generator, grid, seed=seed, step=step, number=number)
    target_BN = union_of_blocks(generator, grid, size, seed=seed, step=step, number=number, slots=group)
    target_BN = target_BN.reshape(len(group), -1)
    rows = slice(slots.start - group.start, slots.stop - group.start)
    ranks_BN = random_ranks(seed, step, number, slots, target_BN.shape[1]) if cfg.truncate == "random" else None
    return _truncated(generator, target_BN, rows, ranks_BN, cfg.multiple_of)


def _truncated(
    generator: BlockMasksConfig, target_BN: Mask, rows: slice, ranks_BN: Ranks | None, multiple: int
) -> tuple[Mask, Mask]:
    """Context and target of the wanted rows, with the lengths of the whole group, rounded down to a multiple.

    max_keep bounds the context before a complement is taken; ``invert`` swaps last (both as published).
    """
    tokens = target_BN.shape[1]
    target_counts = target_BN.sum(axis=1)
    keep_target = int(target_counts.min())
    keep_context = tokens - int(target_counts.max())
    if generator.max_keep is not None:
        keep_context = min(keep_context, generator.max_keep)
    keep_target, keep_context = (n - n % multiple if n > multiple else n for n in (keep_target, keep_context))
    target = target_BN[rows]
    context = ~target
    if not generator.pred_full_complement or generator.full_complement:
        context = subset(context, keep_context, ranks_BN)
    if generator.full_complement:
        target = ~context
    else:
        target = subset(target, keep_target, ranks_BN)
        if generator.pred_full_complement:
            context = ~target
    return (target, context) if generator.invert else (context, target)
