#!/usr/bin/env python3
"""Measures how surprising videos are to a trained model: vjepa_scale/commands/surprise.py."""

from vjepa_scale.commands.surprise import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
