"""Extract features of every video in a folder or in shards: OUT/parts/*.safetensors, OUT/index.jsonl.

python tools/extract_features.py VIDEOS DIR features
python tools/extract_features.py SHARDS DIR features --pool time --layers 5,11 --dtype float16
python tools/extract_features.py SHARDS DIR features --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

Run it again to continue after an interruption. Exit code 0 also where videos were rejected; the last line counts them.
docs/inference.md explains how to read the files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.installed import as_called, program, run_console_command
from vjepa_scale.core.ranks import usable_cores

# Videos per file: a few hundred megabytes of features at most, for short clips.
PART = {"mean": 4096, "time": 1024, "none": 32}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help=f"a folder of videos, or of shards ({program('make_shards')})"
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="weights of any format")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one to go on with")
    parser.add_argument(
        "--pool", choices=PART, default="mean", help="one vector per chunk, per token step, or every token"
    )
    parser.add_argument("--layers", metavar="5,11", help="blocks, from 0, or -1 for the last (default: the output)")
    parser.add_argument(
        "--chunk", type=int, metavar="FRAMES", help="that the encoder sees together (default: as trained)"
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="on disk")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="inside the encoder")
    parser.add_argument("--model", help="which model it is, for a published .pt of others: vit_giant …")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--batch", type=int, default=8, help="chunks per forward pass")
    parser.add_argument("--part", type=int, metavar="VIDEOS", help="per file (default: by --pool)")
    parser.add_argument("--shard", metavar="I/N", default="0/1", help="only parts I, I+N, I+2N, … (I from 0)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes that decode (default: cores)")
    args = parser.parse_args(argv)
    for flag, value in (("--batch", args.batch), ("--part", args.part), ("--workers", args.workers)):
        if value is not None and value < 1:
            raise UserError(f"{value} is too few", where=f"{program('extract_features')} {flag}", fix="1 or more")
    share = _share(args.shard)
    layers = _layers(args.layers)

    from vjepa_scale.inference.extraction import DTYPES, Settings, extract
    from vjepa_scale.inference.model import load_model

    model = load_model(args.checkpoint, args.device, model=args.model, dtype=DTYPES[args.precision])
    tubelet = model.config.model.tubelet
    chunk = model.config.frames if args.chunk is None else args.chunk
    if chunk < 1 or chunk % tubelet:
        raise UserError(
            f"{chunk} frames", where=f"{program('extract_features')} --chunk", fix=f"a multiple of {tubelet}"
        )
    depth = len(model.encoder.blocks)
    if layers is not None and any(not -depth <= layer < depth for layer in layers):
        raise UserError(
            f"not in -{depth} … {depth - 1}", where=f"{program('extract_features')} --layers", fix="blocks that exist"
        )
    settings = Settings(args.pool, layers, chunk, args.dtype, args.batch, args.part or PART[args.pool])
    with tqdm(desc="parts", disable=None) as bar:  # shown only on a terminal

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = extract(args.source, args.out, model, settings, share=share, workers=args.workers, progress=progress)
    if summary.missing:
        print(f"{args.out}: {summary.missing} parts of other shards are missing; who writes the last one merges")
    print(
        f"{args.out}: {summary.chunks} chunks in {summary.parts} parts; rejected: {summary.rejected} videos"
        + (f" (see {args.out / 'rejected.jsonl'})" if summary.rejected and not summary.missing else "")
    )


def _share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"{text!r}", where=f"{program('extract_features')} --shard", fix="I/N with I from 0 to N-1")
    return int(number), int(count)


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r}", where=f"{program('extract_features')} --layers", fix="numbers, as 5,11") from None


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
