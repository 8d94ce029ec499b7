#!/usr/bin/env python3
"""Renders a synthetic world to MP4 files: vjepa_scale/commands/synthetic.py."""

from vjepa_scale.commands.synthetic import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
