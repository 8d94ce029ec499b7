"""Workers go on when a cluster manager signals every process of a job: the rank wants to finish its step."""

import subprocess
import sys
from pathlib import Path

import pytest

SIGNALLED = """
import signal
import psutil
from vjepa_scale.data.loader import Prefetched
from vjepa_scale.training.interrupt import SIGNALS, Interrupt

def main():
    interrupt = Interrupt()
    interrupt.listen()
    loader = Prefetched(abs, range(100), workers=2, prefetch=2)
    seen = 0
    for item in loader:
        if item == 10:
            others = psutil.Process().children(recursive=True)
            assert len(others) >= 4, others  # two workers, the fork server, Python's resource tracker
            for number in SIGNALS:
                for process in others:
                    process.send_signal(number)
                signal.raise_signal(number)
        seen += 1
    loader.close()
    print(seen, interrupt.signal)

if __name__ == "__main__":
    main()
"""


@pytest.mark.distributed
def test_only_the_rank_hears_a_signal_to_all(tmp_path: Path) -> None:
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "100 SIGUSR2\n", done.stderr
