#!/usr/bin/env python3
"""Evaluates the checkpoints of a run on held-out clips: vjepa_scale/commands/evaluate.py."""

from vjepa_scale.commands.evaluate import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
