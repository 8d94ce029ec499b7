"""Collects garbage on all ranks in the same step, between steps.

Python collects when counters of allocations say so, on each rank at another time, in the middle of a step: the other
ranks wait for the one that collects. A full collection looks at every object, and PyTorch alone has hundreds of
thousands: it takes longer than many a step. So what there is when the steps begin is left out of all collections in
them (``gc.freeze``).
"""

import gc
from types import TracebackType

# Steps between collections of young objects. One of all new objects comes with each checkpoint.
EVERY = 50


class SharedCollections:
    """No automatic collection inside a ``with`` statement. Call ``after`` on every rank, after each step."""

    def __enter__(self) -> "SharedCollections":
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_on:
            gc.enable()

    def after(self, step: int, *, saved: bool) -> None:
        """Collects, if it is this step's turn. saved: a checkpoint was begun after it"""
        if saved:
            gc.collect()
        elif (step + 1) % EVERY == 0:
            gc.collect(1)
