#!/usr/bin/env python3
"""Converts weights of any format to files that other tools load: vjepa_scale/commands/consolidate.py."""

from vjepa_scale.commands.consolidate import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
