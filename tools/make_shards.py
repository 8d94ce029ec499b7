#!/usr/bin/env python3
"""Makes WebDataset shards of videos and images: vjepa_scale/commands/shards.py."""

from vjepa_scale.commands.shards import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
