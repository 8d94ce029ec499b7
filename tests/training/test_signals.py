"""How long a rank waits for its data after a signal: with a timer that only notes what it is set to."""

import os
import signal
from types import SimpleNamespace

import pytest

from vjepa_scale.run.failures import NothingSaved
from vjepa_scale.training import signals
from vjepa_scale.training.signals import SIGNAL_DELAY, Interrupt, data_patience_s


@pytest.mark.parametrize(
    ("name", "given", "seconds"),
    [
        ("SIGUSR2", "300", 150.0),
        ("SIGUSR2", "16", 10.0),
        ("SIGUSR2", None, 10.0),  # no launcher: torchrun or srun by hand
        ("SIGUSR2", "5m", 10.0),
        ("SIGTERM", "300", 10.0),
        ("SIGTERM", None, 10.0),
    ],
)
def test_the_time_for_data_to_come(name: str, given: str | None, seconds: float) -> None:
    assert data_patience_s(name, {} if given is None else {SIGNAL_DELAY: given}) == seconds


class Timer:
    """left_s: until it fires; 0: it is not set"""

    def __init__(self) -> None:
        self.left_s = 0.0

    def setitimer(self, _: int, seconds: float) -> None:
        self.left_s = seconds

    def getitimer(self, _: int) -> tuple[float, float]:
        return self.left_s, 0.0


@pytest.mark.parametrize(
    ("before", "inside", "left_s"),
    [
        ([], [], 0.0),
        ([], [(signal.SIGUSR2, 0.0)], 150.0),
        ([], [(signal.SIGTERM, 0.0)], 10.0),
        ([signal.SIGUSR2], [], 150.0),
        ([signal.SIGTERM], [], 10.0),
        ([], [(signal.SIGUSR2, 0.0), (signal.SIGUSR2, 100.0)], 50.0),  # a repetition gives no more time
        ([], [(signal.SIGUSR2, 0.0), (signal.SIGTERM, 100.0)], 10.0),  # TERM after it leaves less
        ([], [(signal.SIGUSR2, 0.0), (signal.SIGTERM, 145.0)], 5.0),
        ([], [(signal.SIGTERM, 0.0), (signal.SIGUSR2, 4.0)], 6.0),
        ([signal.SIGTERM], [(signal.SIGUSR2, 4.0)], 6.0),
    ],
)
def test_when_a_wait_ends(
    before: list[signal.Signals],
    inside: list[tuple[signal.Signals, float]],
    left_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """inside: signals during the wait, and the seconds that have passed since the one before."""
    timer = Timer()
    fake = SimpleNamespace(**{**vars(signal), "setitimer": timer.setitimer, "getitimer": timer.getitimer})
    fake.signal = lambda *_: None
    monkeypatch.setattr(signals, "signal", fake)
    monkeypatch.setitem(os.environ, SIGNAL_DELAY, "300")
    interrupt = Interrupt()
    interrupt.listen(loader_workers=0)
    for number in before:
        interrupt._note(number, None)
    assert timer.left_s == 0  # a step is finished and saved, however long that takes
    with interrupt.ends_wait("the data of step 7"):
        for number, passed_s in inside:
            timer.left_s -= passed_s
            interrupt._note(number, None)
        assert timer.left_s == left_s
        if left_s:
            with pytest.raises(NothingSaved, match="while it waited for the data of step 7: nothing is saved"):
                interrupt._end_wait(signal.SIGALRM, None)
    assert timer.left_s == 0
