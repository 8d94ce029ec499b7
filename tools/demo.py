#!/usr/bin/env python3
"""Runs the whole chain on data that it renders: vjepa_scale/commands/demo.py."""

from vjepa_scale.commands.demo import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
