"""Random subsets of equal size, one per slot, keyed by (seed, step, slot, generator) alone."""

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.rng import key64, mix64, words

Mask = npt.NDArray[np.bool_]
Ranks = npt.NDArray[np.uint64]


def random_ranks(seed: int, step: int, number: int, slots: range, items: int) -> Ranks:
    """A random 64-bit rank for every item (token, or time step) of every slot: uint64 [slots, items]."""
    row_keys = words(key64(seed, "mask.subset", step, number), len(slots), slots.start)
    return mix64(row_keys[:, None] ^ np.arange(items, dtype=np.uint64))


def subset(mask_BN: Mask, keep: int, ranks_BN: Ranks | None) -> Mask:
    """Each row with ``keep`` of its True items: those of lowest rank, or the earliest where there are no ranks."""
    if ranks_BN is None:
        return mask_BN & (np.cumsum(mask_BN, axis=1, dtype=np.int32) <= keep)
    ranked_BN = np.where(mask_BN, ranks_BN, np.uint64(0xFFFFFFFFFFFFFFFF))
    return mask_BN & (ranked_BN <= np.partition(ranked_BN, keep - 1, axis=1)[:, keep - 1 : keep])
