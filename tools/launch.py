#!/usr/bin/env python3
"""Run a recipe's stages on Slurm or here, and look after the run: vjepa_scale/commands/launch.py."""

from vjepa_scale.commands.launch import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
