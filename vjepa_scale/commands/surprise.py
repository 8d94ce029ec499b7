"""Measure the surprise of a trained model at videos: a line of CSV per video, and the curve over time in a file.

python tools/surprise.py DIR clips/ball.mp4 clips/ghost.mp4
python tools/surprise.py DIR VIDEOS --context 4,8,12 --curve curve.csv > surprise.csv

VIDEOS is a file, or a folder to search. docs/surprise.md explains the columns. A video that cannot be scored is named
on stderr; the exit code is 2 if no video can be scored.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.installed import as_called, program, run_console_command

COLUMNS = ("video", "windows", "mean", "maximum", "maximum_start_s", "maximum_end_s")
CURVE_COLUMNS = ("video", "start_s", "end_s", "surprise")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=as_called(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="weights of any format, with a predictor")
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEOS", help="files, or folders of them")
    parser.add_argument("--context", metavar="4,8", help="frames of a window that are seen (default: half)")
    parser.add_argument("--stride", type=int, metavar="FRAMES", help="between windows (default: the tubelet)")
    parser.add_argument("--window", type=int, metavar="FRAMES", help="(default: as trained)")
    parser.add_argument("--fps", type=float, help="(default: as trained)")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="write the surprise of each token step")
    parser.add_argument("--model", help="which model it is, for a published .pt of others: vit_giant …")
    parser.add_argument("--device", help="default: cuda where there is one")
    args = parser.parse_args(argv)
    contexts = _lengths(args.context)
    paths = [path for given in args.videos for path in _files(given)]

    from vjepa_scale.inference.model import load_model

    model = load_model(args.checkpoint, args.device, model=args.model)
    settings = {"context_frames": contexts, "stride": args.stride, "window": args.window, "fps": args.fps}
    rows, curve = csv.writer(sys.stdout), []
    rows.writerow(COLUMNS)
    failed = 0
    for path in paths:
        try:
            found = model.surprise(path, **settings)
        except UserError as error:
            print(f"{path}: {error}" if error.where != path else str(error), file=sys.stderr)
            failed += 1
            continue
        top = int(found.windows[0].argmax())
        where_s = (found.window_start_s[top].item(), found.window_end_s[top].item())
        numbers = (found.mean[0].item(), found.maximum[0].item(), *where_s)
        rows.writerow([path, found.windows.shape[1], *(f"{number:.6g}" for number in numbers)])
        sys.stdout.flush()
        for start_s, end_s, value in zip(
            *(v.tolist() for v in (found.start_s, found.end_s, found.curve[0])), strict=True
        ):
            curve.append([path, f"{start_s:.6g}", f"{end_s:.6g}", "" if value != value else f"{value:.6g}"])
    if failed == len(paths):
        raise UserError(f"none of {failed} videos could be scored", where=args.videos[0])
    if args.curve is not None:
        with args.curve.open("w", newline="") as file:
            csv.writer(file).writerows([CURVE_COLUMNS, *curve])


def _files(given: Path) -> list[Path]:
    from vjepa_scale.shards.sources import list_sources

    if given.is_dir():
        return [given / path for path in list_sources(given, given.resolve().parent)]
    if not given.is_file():
        raise UserError("no such file or folder", where=given, fix="a video, or a folder of them")
    return [given]


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{text!r}", where=f"{program('surprise')} --context", fix="numbers of frames, as 4,8"
        ) from None


def run() -> NoReturn:
    """The console command."""
    run_console_command(main)


if __name__ == "__main__":
    run_command(main)
