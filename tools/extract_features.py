#!/usr/bin/env python3
"""Extracts features of every video in a folder, or in shards: vjepa_scale/commands/features.py."""

from vjepa_scale.commands.features import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
