"""Convert weights of any format to files that other tools load.

python tools/consolidate.py runs/demo --to safetensors --out exported/demo
python tools/consolidate.py runs/demo --to huggingface --out exported/demo_hf
python tools/consolidate.py runs/demo/cooldown/checkpoints/step_00000120 --to published --out exported/demo_pt
python tools/consolidate.py vitg.pt --model vit_giant --size 256 --frames 64 --to huggingface --out exported/vitg
python tools/consolidate.py runs/demo/action --to published --out exported/demo_ac
python tools/consolidate.py runs/demo/probe --to huggingface --out exported/classifier
python tools/consolidate.py --describe runs/demo
python tools/consolidate.py --compare vitl.pt vjepa2-vitl-fpc64-256

docs/formats.md describes the formats, their contents, and their limits.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vjepa_scale.checkpoint.consolidate import (
    FORMATS,
    Format,
    consolidate,
    export_classifier,
    find_checkpoint,
    result_config,
)
from vjepa_scale.checkpoint.formats.native import describe_checkpoint
from vjepa_scale.checkpoint.load import is_probe_stage
from vjepa_scale.core.errors import run_command
from vjepa_scale.core.installed import as_called, run_console_command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        nargs="?",
        type=Path,
        help="a run, stage or checkpoint folder, a consolidated folder, a published .pt or a Hugging Face folder; a "
        "finished probe stage, with --to huggingface: its best probe as VJEPA2ForVideoClassification",
    )
    parser.add_argument(
        "--to",
        choices=list(FORMATS),
        help="safetensors: for vjepa_scale (the default); huggingface: for transformers; published: a .pt for Meta's "
        "code",
    )
    parser.add_argument("--out", type=Path, help="the folder to write: new, empty, or with this same result")
    parser.add_argument(
        "--weights",
        choices=["target", "context"],
        help="EMA target encoder, or the trained one; default: target, and both for --to published",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="round to this type; default: as stored")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="for a published .pt of others: vit_large, vit_huge, vit_giant … or heads=22[,predictor_heads=12]",
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the clips, if the source lacks it")
    parser.add_argument("--frames", type=int, help="frames of the clips, if the source lacks it")
    parser.add_argument("--encoder-only", action="store_true", help="leave the predictor out")
    parser.add_argument(
        "--no-check", action="store_true", help="huggingface: skip the comparison with ours (two models in memory)"
    )
    parser.add_argument("--describe", type=Path, metavar="PATH", help="describe a checkpoint, and stop")
    _add_compare_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.describe is not None:
        print("\n".join(describe_checkpoint(find_checkpoint(arguments.describe, check=False))))
        return 0
    if arguments.compare is not None:
        return 0 if _compare(arguments, parser) else 1
    if arguments.clips or arguments.device:
        parser.error("--clips and --device are options of --compare")
    if arguments.source is None or arguments.out is None:
        parser.error("give SOURCE and --out, or --describe PATH, or --compare PATH [PATH2]")
    to: Format = arguments.to or "safetensors"
    if to == "huggingface" and is_probe_stage(arguments.source):
        given = (arguments.weights, arguments.dtype, arguments.model, arguments.size, arguments.frames)
        if any(given) or arguments.encoder_only:
            parser.error("of a probe stage, --to and --out only: the stage says the rest")
        trained = export_classifier(arguments.source, arguments.out, check=not arguments.no_check, say=print)
        print(f"written: {arguments.out}: {trained.result['best']['probe']}, {len(trained.classes)} classes")
        return 0
    done = "written again" if (arguments.out / FORMATS[to][0]).exists() else "written"
    consolidate(
        arguments.source,
        arguments.out,
        to=to,
        weights=arguments.weights,
        dtype=arguments.dtype,
        model=arguments.model,
        frames=arguments.frames,
        size=arguments.size,
        encoder_only=arguments.encoder_only,
        check=not arguments.no_check,
        say=print,
    )
    print(f"{done}: {arguments.out}: {result_config(arguments.out, to).title()}")
    return 0


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--compare`` and its options to a command that has --model, --size and --frames."""
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar=("PATH", "PATH2"),
        help="run weights through this package and through transformers on the same clips, print the differences, and "
        "stop; PATH2: the Hugging Face folder of the same model. Exit code 0: they agree, 1: they differ",
    )
    parser.add_argument(
        "--clips",
        nargs="+",
        metavar="N|VIDEO",
        help="compare: how many clips of noise, or video files; default: 1",
    )
    parser.add_argument("--device", help="compare: cpu (default), cuda, cuda:1")


def _compare(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    from vjepa_scale.inference.compare import compare  # imports decoders, which other commands do not need

    source, *more = arguments.compare
    others = ("source", "to", "out", "weights", "dtype", "encoder_only", "no_check")
    if len(more) > 1 or any(getattr(arguments, name) for name in others):
        parser.error("--compare takes one or two paths, --model, --size, --frames, --clips and --device")
    given = arguments.clips or ["1"]
    numbered = len(given) == 1 and given[0].isdigit()
    return compare(
        source,
        *more,
        model=arguments.model,
        size=arguments.size,
        frames=arguments.frames,
        clips=int(given[0]) if numbered else 1,
        videos=() if numbered else [Path(clip) for clip in given],
        device=arguments.device or "cpu",
    )


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
