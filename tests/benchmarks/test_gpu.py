"""benchmarks/gpu.py: its toy on a CPU, from beginning to end, and which rows a command measures."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PARTS = {"tests": 1, "step": 24, "peer": 1, "loader": 3, "save": 3, "resume": 2}  # rows of the toy
WORDS = {"part", "name", "shape", "settings", "state", "reason", "torch", "card", "date", "command"}
NUMBERS = {"median_ms", "low_ms", "high_ms", "clips_per_s", "tflops", "mfu_product", "peak_gib", "seconds"}
OTHERS = {"mfu_data_sheet", "product_tflops", "shares", "facts"}
STEP = {"target", "context", "predictor", "backward", "optimiser", "EMA", "rest"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


# parts asked for, states of rows that are there, seconds of each unit, limit → what is measured, what is left out
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "all": ({"parts": ["tests", "step"]}, ["tests", "a", "b", "c"], []),
    "one part": ({"parts": ["step"]}, ["a", "b", "c"], []),
    "what is there is not measured again": ({"states": {"a": "measured", "c": "failed"}}, ["b"], []),
    "of two rows, one is missing": ({"parts": ["peer"], "states": {"ours": "measured"}}, ["ours"], []),
    "again": ({"states": {"a": "measured"}, "again": True}, ["a", "b", "c"], []),
    "absent: looked for again": ({"states": {"a": "absent", "b": "measured", "c": "refused"}}, ["a"], []),
    "cut off before: last": ({"states": {"a": "cut off"}}, ["b", "c", "a"], []),
    "rows of another card": ({"states": {"a": "measured"}, "card": "another"}, ["a", "b", "c"], []),
    "too little time for another as long": ({"seconds": {"a": 40}, "limit": 79}, ["a"], ["b", "c"]),
    "just enough": ({"seconds": {"a": 40, "b": 10}, "limit": 80}, ["a", "b"], ["c"]),
    "no time": ({"limit": 0}, [], ["a", "b", "c"]),
    "a row that fails": ({"fails": {"a": ValueError("no\nkernel")}}, ["a", "b", "c"], []),
    "the device is lost": ({"lost": "b"}, ["a", "b"], ["c"]),
}


@pytest.mark.parametrize("name", CASES)
def test_which_rows_are_measured(name: str, gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, measured, left_out = CASES[name]
    parts, states = case.get("parts", ["step"]), case.get("states", {})
    clock = [1000.0]
    begun: list[str] = []

    class Session:
        problem = ""

        def tidy(self) -> None:
            self.problem = "lost" if begun[-1] == case.get("lost") else ""

    def run(_: Session, unit: Any) -> list[dict[str, Any]]:
        begun.append(unit.names[0])
        clock[0] += case.get("seconds", {}).get(unit.names[0], 1)
        if error := case.get("fails", {}).get(unit.names[0]):
            raise error
        return [{"name": row} for row in unit.names]

    every = [
        gpu.Unit("tests", ("tests",), run),
        *(gpu.Unit("step", (letter,), run) for letter in "abc"),
        gpu.Unit("peer", ("ours", "published"), run),
    ]
    units = [unit for unit in every if unit.part in parts]
    before = gpu.Book(tmp_path, card=case.get("card", "H200"), parts=[])
    for unit in units:
        before.add(unit, [{"name": row, "state": states[row]} for row in unit.names if row in states], seconds=1.0)
    book = gpu.Book(tmp_path, card="H200", parts=parts)
    chosen = gpu.pending(units, book, case.get("again", False))
    left = gpu.measure(chosen, Session(), book, limit_s=case.get("limit", 570), began=1000.0, now=lambda: clock[0])
    assert begun == measured
    assert [unit.names[0] for unit in left] == left_out
    book.say_left_out(left)
    assert ("The same command again goes on" in (tmp_path / "rows.md").read_text()) == bool(left)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text()) if row["card"] == "H200"}
    for row in begun:
        failed = row in case.get("fails", {})
        assert rows[row]["state"] == ("failed" if failed else "measured")
        assert rows[row]["reason"] == ("ValueError: no kernel" if failed else "")
    capsys.readouterr()


def test_a_row_that_is_cut_off_does_not_replace_an_older_one(gpu: Any, tmp_path: Path) -> None:
    unit = gpu.Unit("step", ("a",), lambda *_: [])
    book = gpu.Book(tmp_path, card="H200", parts=["step"])
    for state, kept in (("cut off", "cut off"), ("measured", "measured"), ("cut off", "measured")):
        book.add(unit, [{"name": "a", "state": state}], seconds=1.0)
        assert [row["state"] for row in json.loads((tmp_path / "rows.json").read_text())] == [kept]


def test_a_row_that_takes_too_long_is_cut_off(gpu: Any) -> None:
    def endless(*_: object) -> list[dict[str, Any]]:
        while True:
            pass

    rows = gpu._attempt(gpu.Unit("step", ("a", "b"), endless), None, 0.05)
    assert [(row["name"], row["state"]) for row in rows] == [("a", "cut off"), ("b", "cut off")]


def test_a_bit_is_a_difference(gpu: Any) -> None:
    difference = sys.modules["gpu_resume"].difference
    whole = [{"step": step, "loss": 0.5, "grad_norm": 0.25} for step in range(3)]
    assert difference(whole, [dict(row) for row in whole]) == ""
    assert difference(whole, whole[:2]) == "3 steps in the undisturbed run, 2 in the killed one"
    other = [*whole[:2], {**whole[2], "grad_norm": math.nextafter(0.25, 1)}]
    found = difference(whole, other)
    assert found == "step 2: grad_norm 0.25 undisturbed, 0.25000000000000006 after kill -9"


def benchmark(*words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--toy", *words]
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_the_toy(tmp_path: Path) -> None:
    done = benchmark("--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {part: sum(row["part"] == part for row in rows) for part in PARTS} == PARTS
    for row in rows:
        assert set(row) == WORDS | NUMBERS | OTHERS
        values = [row[name] for name in NUMBERS] + [*row["shares"].values()]
        assert all(math.isfinite(value) for value in values if value is not None), row
        assert row["mfu_data_sheet"] is None
        if row["part"] in ("step", "loader", "save") and row["state"] == "measured":
            assert row["median_ms"] > 0
            if row["name"] not in ("the loader alone", "what training waits for a save"):
                assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
                assert row["clips_per_s"] == pytest.approx(1000 * int(row["shape"][-1]) / row["median_ms"])
                assert row["tflops"] / row["product_tflops"] == pytest.approx(row["mfu_product"])
        if row["part"] == "step" and row["state"] == "measured":
            assert set(row["shares"]) == STEP
            assert sum(row["shares"].values()) == pytest.approx(1)
    # What a CPU cannot do is said, and nothing else failed.
    assert {row["settings"].rpartition(" ")[2] for row in rows if row["state"] == "failed"} == {"varlen", "fa3", "fa4"}
    assert all("it needs a GPU" in row["reason"] for row in rows if row["state"] == "failed")
    assert [row["part"] for row in rows if row["state"] == "absent"] == ["peer"]
    facts = {(row["part"], row["name"]): row["facts"] for row in rows}
    assert facts["tests", "kernels' tests"]["passed"] > 0
    assert facts["tests", "kernels' tests"]["failed"] == 0
    assert 0 <= facts["loader", "fed by the loader"]["share waited for data"] < 1
    killed = facts["resume", "kill -9"]
    assert killed["equal"] is True
    assert 0 < killed["resumed from step"] < killed["steps"] == 60
    assert 0 < killed["killed after step"] < 60

    lines = [line for line in (tmp_path / "rows.md").read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    head, _, *table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head[:5] == ["part", "name", "shape", "settings", "state"]
    assert [cells[:5] for cells in table] == [[row[name] for name in head[:5]] for row in rows]

    again = benchmark("--out", tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    now = json.loads((tmp_path / "rows.json").read_text())
    measured = [[row for row in some if row["state"] != "absent"] for some in (rows, now)]
    assert measured[0] == measured[1]
