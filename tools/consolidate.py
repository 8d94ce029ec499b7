#!/usr/bin/env python3
"""Weights of any format become files that other tools load: vjepa_scale/commands/consolidate.py."""

from vjepa_scale.commands.consolidate import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
