"""The rows of benchmarks/gpu.py, and the files that store them."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vjepa_scale.core.files import read_json, write_atomic, write_json

Row = dict[str, Any]
Switches = Mapping[str, Any]  # keys of the recipe's section engine

PARTS = ("tests", "step", "peer", "loader", "save", "resume")
JUDGED = ("tests", "save", "resume")  # of these, a failed row makes the exit code 1
# States of a row. The next command retries "absent" (something is not installed or was not given) and "cut off" (by the
# time limit). "refused": by the product, as documented.
FINISHED = ("measured", "failed", "out of memory", "refused")


@dataclass(frozen=True)
class Shape:
    frames: int
    size: int  # pixels
    batch: int  # clips

    def __str__(self) -> str:
        return f"{self.frames}×{self.size}×{self.batch}"


@dataclass(frozen=True)
class Unit:
    """Rows that are measured together.

    names:    of the rows
    switches: switches of the recipe's engine that differ from the base
    settings: names of all switches in rows
    """

    part: str
    names: tuple[str, ...]
    measure: "Callable[[Any, Unit], list[Row]]"
    shape: Shape | None = None
    switches: Switches = field(default_factory=dict)
    settings: str = ""

    @property
    def keys(self) -> list[tuple[str, ...]]:
        return [(self.part, name, str(self.shape or ""), self.settings) for name in self.names]


def key_of(row: Row) -> tuple[str, ...]:
    return row["part"], row["name"], row["shape"], row["settings"]


EMPTY: Row = {
    "state": "measured",
    "reason": "",
    "median_ms": None,
    "low_ms": None,  # quartiles
    "high_ms": None,
    "clips_per_s": None,
    "tflops": None,  # model FLOPs, 10¹² a second
    "mfu_data_sheet": None,
    "mfu_product": None,
    "product_tflops": None,
    "peak_gib": None,
    "shares": {},  # of the step, by part
    "facts": {},  # values that only rows of this part have
}
HEADS = (
    "part",
    "name",
    "shape",
    "settings",
    "state",
    "ms",
    "quartiles",
    "clips/s",
    "TFLOP/s",
    "of the data sheet",
    "of a product",
    "peak GiB",
    "shares of the step",
    "remarks",
)


class Book:
    """The rows of a folder: rows.json for programs, rows.md for readers. A row replaces an older one of the same key.

    parts: parts of this command; their "absent" rows are retried
    """

    def __init__(self, folder: Path, *, card: str, parts: Sequence[str]) -> None:
        self.card = card
        self._json, self._markdown = folder / "rows.json", folder / "rows.md"
        known: list[Row] = read_json(self._json) if self._json.exists() else []
        self.rows = [
            row for row in known if row["state"] != "absent" or row["part"] not in parts or row["card"] != card
        ]

    def add(self, unit: Unit, rows: Sequence[Row], *, seconds: float) -> None:
        for row in rows:
            whole: Row = {
                "part": unit.part,
                "name": row["name"],
                "shape": str(unit.shape or ""),
                "settings": unit.settings,
                **EMPTY,
                **row,
                "seconds": round(seconds, 1),  # duration of the unit, with warm-up
                "torch": torch.__version__,
                "card": self.card,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": shlex.join(["python", *sys.argv]),
            }
            print(table_line(cells(whole)), flush=True)
            same = [old for old in self.rows if key_of(old) == key_of(whole) and old["card"] == self.card]
            if whole["state"] in FINISHED or not any(old["state"] in FINISHED for old in same):
                self.rows = [*(old for old in self.rows if old not in same), whole]
        self.rows.sort(key=lambda row: PARTS.index(row["part"]))
        self._write()

    def say_left_out(self, units: Sequence[Unit]) -> None:
        """Reports left-out units, if any, on standard output and at the end of rows.md."""
        if units:
            named = "; ".join(" ".join([*unit.keys[0]]).strip() for unit in units)
            note = f"Left out by the last command, {len(units)}: {named}. The same command again goes on with these."
            print(note, flush=True)
            self._write(note)

    def _write(self, note: str = "") -> None:
        write_json(self._json, self.rows)
        lines = ["# benchmarks/gpu.py", "", table_line(HEADS), "|" + "---|" * len(HEADS)]
        lines += [table_line(cells(row)) for row in self.rows]
        commands = dict.fromkeys((row["card"], row["torch"], row["date"][:10], row["command"]) for row in self.rows)
        lines += ["", *(f"- {card}, PyTorch {version}, {day}: `{command}`" for card, version, day, command in commands)]
        write_atomic(self._markdown, "\n".join([*lines, *(["", note] if note else [])]) + "\n")


def table_line(words: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in words) + " |"


def cells(row: Row) -> list[str]:
    def number(name: str, form: str) -> str:
        return "" if row[name] is None else format(row[name], form)

    quartiles = f"{row['low_ms']:.1f} to {row['high_ms']:.1f}" if row["low_ms"] is not None else ""
    shares = ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items())
    facts = ", ".join(f"{name} {_plain(value)}" for name, value in row["facts"].items())
    return [
        *(str(row[name]) for name in ("part", "name", "shape", "settings", "state")),
        number("median_ms", ".1f"),
        quartiles,
        number("clips_per_s", ".2f"),
        number("tflops", ".3f"),
        number("mfu_data_sheet", ".1%"),
        number("mfu_product", ".1%"),
        number("peak_gib", ".2f"),
        shares,
        "; ".join(filter(None, (row["reason"], facts))),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
