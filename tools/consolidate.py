#!/usr/bin/env python3
"""Turn a sharded checkpoint into files that other tools load.

python tools/consolidate.py runs/demo --to safetensors --out exported/demo
python tools/consolidate.py runs/demo/cooldown/checkpoints/step_00000120 --to safetensors --out exported/demo_120
python tools/consolidate.py --describe runs/demo
"""

import argparse
from pathlib import Path

from vjepa_scale.checkpoint.consolidate import consolidate, find_checkpoint
from vjepa_scale.checkpoint.consolidated import WEIGHTS_FILE, read_config
from vjepa_scale.checkpoint.describe import describe
from vjepa_scale.core.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="a run, a stage or a checkpoint folder")
    parser.add_argument("--to", choices=["safetensors"], default="safetensors", help="the format")
    parser.add_argument("--out", type=Path, help="the folder to write: new, empty, or with this same result")
    parser.add_argument(
        "--weights", choices=["target", "context"], default="target", help="EMA target encoder, or the trained one"
    )
    parser.add_argument("--describe", type=Path, metavar="PATH", help="say what a checkpoint is, and stop")
    arguments = parser.parse_args()
    if arguments.describe is not None:
        print("\n".join(describe(find_checkpoint(arguments.describe, check=False))))
        return 0
    if arguments.source is None or arguments.out is None:
        parser.error("give SOURCE and --out, or --describe PATH")
    done = "written again" if (arguments.out / WEIGHTS_FILE).exists() else "written"
    config = read_config(consolidate(arguments.source, arguments.out, weights=arguments.weights))
    print(f"{done}: {arguments.out}: the {config.weights} encoder of {config.stage} at step {config.step}")
    return 0


if __name__ == "__main__":
    run_command(main)
