#!/usr/bin/env python3
"""Videos and images become WebDataset shards: vjepa_scale/commands/shards.py."""

from vjepa_scale.commands.shards import main
from vjepa_scale.core.errors import run_command

if __name__ == "__main__":
    run_command(main)
