#!/usr/bin/env python3
"""Writes a report of runs: vjepa_scale/commands/report.py."""

from vjepa_scale.commands.report import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
