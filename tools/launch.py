#!/usr/bin/env python3
"""Runs a recipe's stages on Slurm or on this machine: vjepa_scale/commands/launch.py."""

from vjepa_scale.commands.launch import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
