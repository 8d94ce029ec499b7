"""Runs all GPU measurements, row by row, so that an interrupted command loses no finished row.

For a machine without a network where a command may last ten minutes. One command measures as many rows as fit into
--limit-s seconds; the same command again continues with the missing ones. OUT/rows.json and OUT/rows.md are rewritten
after each row.

    tests    pytest -m gpu
    step     the training step of ViT-g at three shapes, frames × pixels × clips, with one switch changed at a time
    peer     the published code's step and ours, alternating, with the same sizes, clips and masks (--peer FOLDER)
    loader   the step with prepared clips, the same step with clips from shards, the loader alone
    save     the step, the wait for a save in the background, and the step while files are written
    resume   kill -9 and a restart by the launcher, compared with an undisturbed run: equal to the bit; two processes

    python benchmarks/gpu.py --peer build/vjepa2 --out runs/gpu
    python benchmarks/gpu.py --part step loader --out runs/gpu
    OMP_NUM_THREADS=1 python benchmarks/gpu.py --device cpu --toy

Warm-up steps and timed steps have the same masks. The exit code is 1 where a row of tests, save or resume failed for a
reason other than memory.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpu_book import FINISHED, HEADS, JUDGED, PARTS, Book, Row, Shape, Switches, Unit, key_of, table_line
from gpu_resume import measure_resume, measure_two
from gpu_rows import (
    LOADER_ROWS,
    SAVE_ROWS,
    Absent,
    Session,
    Sizes,
    measure_loader,
    measure_save,
    measure_step,
    measure_tests,
    no_peer,
    one_line,
)

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.distributed import process_group

ROOT = Path(__file__).resolve().parents[1]

FULL = Sizes(
    shapes=(Shape(16, 256, 24), Shape(64, 256, 6), Shape(64, 384, 2)),
    base={"compile": True, "activation_checkpointing": "none", "attention": "auto"},
    switches=(
        {},
        {"compile": False},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full"},
        {"attention": "sdpa"},
        {"attention": "flash"},
        {"attention": "varlen"},
        {"attention": "fa3"},
        {"attention": "fa4"},
    ),
    of_peer=({}, {"activation_checkpointing": "full"}, {"compile": False}),
    steps=10,
    saves=3,
    videos=96,
    video_fps=30,
    trained_shape=Shape(16, 128, 8),
    trained_steps=120,
    trained=("model.encoder={width: 384, depth: 6, heads: 6}",),
)
_SMALL = (
    "model.encoder={width: 48, depth: 2, heads: 2}",
    "model.predictor={width: 24, depth: 2, heads: 2}",
    "model.patch=8",
)
TOY = Sizes(
    shapes=(Shape(4, 32, 2), Shape(8, 32, 1), Shape(4, 48, 1)),
    base=FULL.base,
    switches=FULL.switches,
    of_peer=({},),
    steps=3,
    saves=2,
    videos=12,
    video_fps=8,
    trained_shape=Shape(4, 32, 4),
    trained_steps=60,
    trained=_SMALL,
    model="vit_tiny",
    changes=_SMALL,
)


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU", where="--device cuda", fix="--device cpu --toy, which tries the script")
    if arguments.device == "cpu" and not arguments.toy:
        raise UserError("a step of ViT-g takes an hour on a CPU", where="--device cpu", fix="--toy")
    began = time.monotonic()
    parts = [part for part in PARTS if part in (arguments.part or PARTS)]
    sizes = TOY if arguments.toy else FULL
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    book = Book(arguments.out, card=card, parts=parts)
    peer = arguments.peer if arguments.peer and (arguments.peer / "src" / "models").is_dir() else None
    print(table_line(HEADS) + "\n|" + "---|" * len(HEADS), flush=True)
    # An interrupted save may still write into it.
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-", ignore_cleanup_errors=True) as folder:
        session = Session(arguments.device, sizes, Path(folder), toy=arguments.toy, peer=peer)
        units = pending(units_of(parts, sizes, device=arguments.device, peer=peer is not None), book, arguments.again)
        left = measure(units, session, book, limit_s=arguments.limit_s, began=began)
        if not session.problem:  # else NCCL would raise or hang
            process_group.stop()
    book.say_left_out(left)
    wrong = [row for row in book.rows if row["card"] == card and row["part"] in parts and is_wrong(row)]
    for row in wrong:
        print(f"wrong: {row['part']}, {row['name']}: {row['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", action="extend", choices=PARTS, help="default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="small networks and few steps: tries the script")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of facebookresearch/vjepa2")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", metavar="FOLDER")
    parser.add_argument("--limit-s", type=float, default=570.0, help="of this command; default: 570")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    return parser


# -- which rows, and when ----------------------------------------------------------------------------


def units_of(parts: Sequence[str], sizes: Sizes, *, device: str, peer: bool) -> list[Unit]:
    """Returns all rows of some parts. Skips Inductor on a CPU, where it may lack a compiler and takes minutes."""
    base = sizes.base if device == "cuda" else {**sizes.base, "compile": False}

    def switched(part: str, names: tuple[str, ...], run: Any, shape: Shape, changes: Switches) -> Unit:
        return Unit(part, names, run, shape, {**base, **changes}, _settings({**base, **changes}))

    def several(part: str, names: tuple[str, ...], run: Any, variants: Sequence[Switches]) -> list[Unit]:
        chosen = [changes for changes in variants if not changes or not changes.items() <= base.items()]
        return [switched(part, names, run, shape, changes) for changes in chosen for shape in sizes.shapes]

    killed = [{"compile": False}, *([{"compile": True}] if base["compile"] else [])]
    every = {
        "tests": [Unit("tests", ("GPU tests" if device == "cuda" else "kernels' tests",), measure_tests)],
        "step": several("step", ("ours",), measure_step, sizes.switches),
        "peer": several("peer", ("ours", "published"), measure_step, sizes.of_peer)
        if peer
        else [Unit("peer", ("published",), no_peer)],
        "loader": [switched("loader", LOADER_ROWS, measure_loader, sizes.shapes[0], {})],
        "save": [switched("save", SAVE_ROWS, measure_save, sizes.shapes[0], {})],
        "resume": [
            *(switched("resume", ("kill -9",), measure_resume, sizes.trained_shape, changes) for changes in killed),
            switched("resume", ("two processes",), measure_two, sizes.trained_shape, killed[0]),
        ],
    }
    return [unit for part in parts for unit in every[part]]


def _settings(switches: Switches) -> str:
    words = {**switches, "compile": "on" if switches["compile"] else "off"}
    return ", ".join(f"{key.removeprefix('activation_')} {value}" for key, value in words.items())


def pending(units: Sequence[Unit], book: "Book", again: bool) -> list[Unit]:
    """Returns the units to measure, in order; units that a time limit interrupted before come last."""
    states = {key_of(row): row["state"] for row in book.rows if row["card"] == book.card}
    chosen = [unit for unit in units if again or any(states.get(key) not in FINISHED for key in unit.keys)]
    return sorted(chosen, key=lambda unit: any(states.get(key) == "cut off" for key in unit.keys))


class OutOfTime(BaseException):
    """The time limit of the command is over. (No Exception, which libraries catch.)"""


def measure(
    units: Sequence[Unit],
    session: "Session",
    book: "Book",
    *,
    limit_s: float,
    began: float,
    now: Callable[[], float] = time.monotonic,
) -> list[Unit]:
    """Measures units one after the other and records them; returns those that are left out.

    Starts no unit when less time is left than the longest one took. Interrupts the current unit at the time limit.
    """
    longest = 0.0
    for number, unit in enumerate(units):
        started = now()
        left = limit_s - (started - began)
        if left <= 0 or left < longest:
            return list(units[number:])
        rows = _attempt(unit, session, left)
        longest = max(longest, now() - started)
        book.add(unit, rows, seconds=now() - started)
        session.tidy()
        if session.problem:
            print(f"this process cannot use the GPU any more: {session.problem}", file=sys.stderr)
            return list(units[number + 1 :])
    return []


def _attempt(unit: Unit, session: "Session", seconds: float) -> list[Row]:
    """Returns the unit's rows; where it fails, rows with the reason."""
    try:
        with _limited(seconds):
            return unit.measure(session, unit)
    except OutOfTime:
        state, reason = "cut off", f"after {seconds:.0f} s"
    except Absent as error:
        state, reason = "absent", str(error)
    except torch.OutOfMemoryError as error:
        state, reason = "out of memory", one_line(error)
    except Exception as error:  # noqa: BLE001 (kernels, compilers and drivers fail in many ways; the next row goes on)
        state = "out of memory" if "out of memory" in str(error) else "failed"
        reason = one_line(error)
    return [{"name": name, "state": state, "reason": reason} for name in unit.names]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside the block after ``seconds`` seconds."""

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_wrong(row: Row) -> bool:
    """Returns whether this row makes the exit code 1."""
    return row["part"] in JUDGED and row["state"] == "failed"


if __name__ == "__main__":
    run_command(main)
