"""The earlier name of launch/worker.py, which users' scripts may call: ``-m vjepa_scale.launch.task``."""

from vjepa_scale.core.errors import run_command
from vjepa_scale.launch.worker import main, run_launched

__all__ = ["main", "run_launched"]

if __name__ == "__main__":
    run_command(main)
