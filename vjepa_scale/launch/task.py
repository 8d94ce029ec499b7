"""launch/worker.py under its first name, which scripts of users' own may call: ``-m vjepa_scale.launch.task``."""

from vjepa_scale.core.errors import run_command
from vjepa_scale.launch.worker import main, run_launched

__all__ = ["main", "run_launched"]

if __name__ == "__main__":
    run_command(main)
