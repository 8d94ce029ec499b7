"""How far a rank is, in memory that it shares with its supervisor. Does not import PyTorch.

The supervisor (launch/supervisor.py) is the process that has forked the rank. It reads the page also while the rank is
stopped, holds Python's lock for ever, or is dead.
"""

import ctypes
import mmap

PARTS = ("setup", "load", "forward", "backward", "observe", "reduce", "optimizer", "ema", "save", "evaluation")
OUTSIDE_STEPS = ("setup", "save", "evaluation")
_NO_STEP = -1


class Page(ctypes.Structure):
    """The shared memory. Each field has one writer, and is read and written whole.

    Of the rank:
        pid:      its process
        step:     the step that it loads or computes; _NO_STEP before the first
        part:     index into PARTS of what it does in it
        beats:    grows when a limit begins anew
        limit_ms: the limit from the last beat on; 0: none
        answered: the last ``asked`` that it has answered
        waits:    1 if it waited for its peers when it answered
        ended:    1 once its outcome is written
    Of the supervisor:
        asked: grows when it asks the rank whether it is alive
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("pid", "step", "part", "beats", "limit_ms", "answered", "waits", "ended", "asked")
    ]


def shared_page() -> Page:
    """Returns a page that this process shares with those that it forks from now on."""
    page = Page.from_buffer(mmap.mmap(-1, ctypes.sizeof(Page)))
    page.step = _NO_STEP
    return page


class Progress:
    """``step``: the step that is being computed, for failure reports; ``phase``: its phase's name. None before it.

    page:      where the supervisor sees it; else it is seen by nobody
    step_s:    the limit of a step, seconds; outside_s: of what is done between and before steps. 0: none
    """

    def __init__(
        self,
        step: int | None = None,
        phase: str | None = None,
        *,
        page: Page | None = None,
        step_s: float = 0.0,
        outside_s: float = 0.0,
    ) -> None:
        self.step, self.phase = step, phase
        self.page = Page(step=_NO_STEP) if page is None else page
        self._step_ms, self._outside_ms = int(1000 * step_s), int(1000 * outside_s)

    def begin(self, step: int, *, first: bool) -> None:
        """A step begins, with its wait for data. first: it also starts workers and compiles, as no other one does"""
        self.page.step, self.page.part = step, PARTS.index("load")
        self._beat(self._outside_ms if first else self._step_ms)

    def enter(self, part: str) -> None:
        """The rank goes on with this part, a name of PARTS, or of a region (core/log.py) that is none."""
        if part not in PARTS:
            return
        self.page.part = PARTS.index(part)
        if part in OUTSIDE_STEPS:
            self._beat(self._outside_ms)

    def beat(self) -> None:
        """Work outside steps has come further."""
        self.page.beats += 1

    def rest(self) -> None:
        """From now on nothing has a limit."""
        self._beat(0)

    def _beat(self, limit_ms: int) -> None:
        self.page.limit_ms = limit_ms
        self.page.beats += 1


def step_of(page: Page) -> int | None:
    """Returns the step of a page; None before the first."""
    return None if page.step == _NO_STEP else int(page.step)


def part_of(page: Page) -> str:
    """Returns the part of a page."""
    return PARTS[page.part]
