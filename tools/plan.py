#!/usr/bin/env python3
"""Plans a robot's next actions: vjepa_scale/commands/plan.py."""

from vjepa_scale.commands.plan import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
