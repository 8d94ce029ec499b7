#!/usr/bin/env python3
"""Plants known bugs, one at a time, in a copy of this checkout, and reports which test catches each.

python tools/mutants.py                              # all bugs of tools/mutants*.toml
python tools/mutants.py rope-axes ema-skipped        # some of them
python tools/mutants.py --list
python tools/mutants.py --keep-going --out FILE.md   # do not stop at the first survivor; write the table

For maintainers, not for CI: run it before and after a change to the tests. The copy has the files of the working tree
that git tracks or would add. The tests of the chosen bugs run first without any bug, because a test that fails there
proves nothing. Exits with 1 where a bug survived, and with 2 where there is no result.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from vjepa_scale.core.errors import UserError, run_command
from vjepa_scale.core.worker_pool import kill_processes, process_tree

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path("tools/mutants.toml")  # its header describes an entry; further tables: mutants_*.toml

CAUGHT, TIMED_OUT, SURVIVED, BROKEN = "caught", "caught (time-out)", "SURVIVED", "BROKEN"


@dataclass(frozen=True)
class Mutant:
    """One bug.

    bug:   description
    file:  the changed file, relative to the root of the checkout
    old:   text that is in the file exactly once; new: its replacement
    tests: files or node ids of fast tests for pytest
    slow:  there is no fast test, so tests marked slow may run too
    """

    name: str
    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    slow: bool = False

    def planted(self, root: Path) -> str:
        """Returns the text of the file with the bug. Raises UserError where the edit does not match exactly once."""
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        if (found := text.count(self.old)) != 1:
            raise UserError(
                f"{self.name}: its old text is {found} times in {self.file}: the table is stale",
                where=TABLE,
                fix="bring the entry up to date with the code",
            )
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Outcome:
    """Result of a mutant. test, message: the test that caught it, and the first line of its message"""

    mutant: Mutant
    verdict: str
    seconds: float
    test: str = ""
    message: str = ""


def read_table(root: Path) -> list[Mutant]:
    """Reads the mutants of tools/mutants*.toml. Raises UserError where one is unreadable, or two have the same name."""
    mutants: dict[str, Mutant] = {}
    for path in sorted((root / TABLE.parent).glob(f"{TABLE.stem}*.toml")):
        try:
            table = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise UserError(str(error), where=path, fix="mend the table") from None
        for name, entry in table.items():
            if name in mutants:
                raise UserError(f"another mutant is called {name!r}, too", where=path, fix="rename one of them")
            mutants[name] = Mutant(name=name, **{**entry, "tests": tuple(entry["tests"])})
    return list(mutants.values())


# -- the copy ----------------------------------------------------------------------------------------


def copy_checkout(root: Path, to: Path) -> None:
    """Copies the files of the working tree that git tracks or would add."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=root, capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise UserError("git does not list its files", where=root, fix="run this in a clone") from None
    for name in os.fsdecode(names).split("\0"):
        if name and (root / name).is_file():  # git also lists deleted files
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def environment_of(copy: Path) -> dict[str, str]:
    """Returns an environment in which a process and its children import the copy, without bytecode of other mutants."""
    before = os.environ.get("PYTHONPATH")
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(copy), *([before] if before else [])]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def check_imports(copy: Path) -> None:
    """Raises UserError where a process started by a test would import another vjepa_scale."""
    line = "import vjepa_scale; print(vjepa_scale.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=copy.parent, env=environment_of(copy), capture_output=True, text=True
    )
    _refuse_other_copy(done.stdout.strip(), copy)


def _refuse_other_copy(imported: str, copy: Path) -> None:
    if not imported or not Path(imported).resolve().is_relative_to(copy.resolve()):
        raise UserError(f"tests import {imported or 'nothing'}, not the copy in {copy}", fix="start in a clean shell")


# -- running tests -----------------------------------------------------------------------------------


_RUNNING: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Ran:
    """One run of pytest.

    rows: written by tests/recorder.py, one per test; timed_out: it was killed at the limit; output: its last lines
    """

    rows: list[dict[str, str]]
    timed_out: bool
    output: str


def run_tests(copy: Path, tests: Iterable[str], *, slow: bool, limit_s: float, words: Sequence[str] = ()) -> Ran:
    """Runs pytest in the copy. Raises UserError where it imports vjepa_scale from somewhere else."""
    with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
        record, out = Path(folder) / "record.jsonl", Path(folder) / "out"
        marks = () if slow else ("-m", "not slow and not slurm")
        plugins = ("-p", "no:cacheprovider", "-p", "tests.recorder", "--record", record)
        # Raises pytest-timeout's limit for each test, because a loaded machine may need more time.
        own = ("--basetemp", f"{folder}/t", "-o", f"timeout={limit_s:g}")
        command = (sys.executable, "-m", "pytest", "-q", *plugins, *own, *marks, *words, *tests)
        with open(out, "w") as stream:
            process = subprocess.Popen(
                command, cwd=copy, env=environment_of(copy), stdout=stream, stderr=subprocess.STDOUT
            )
            _RUNNING.add(process)
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                timed_out = process.poll() is None
                _end(process)
                _RUNNING.discard(process)
        rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        output = "\n".join(out.read_text(errors="replace").splitlines()[-20:])
    if rows:
        _refuse_other_copy(rows.pop(0)["imported"], copy)
    return Ran(rows, timed_out, output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a running process and all its children."""
    if process.poll() is None:
        kill_processes(process_tree(process.pid))
        process.wait()


def check_unmutated(copy: Path, mutants: Sequence[Mutant], *, limit_s: float) -> None:
    """Raises UserError unless, without a bug, no test of these mutants fails and each mutant has one that passes."""
    passed: set[str] = set()
    for slow in (False, True):
        tests = sorted({test for mutant in mutants if mutant.slow == slow for test in mutant.tests})
        if not tests:
            continue
        ran = run_tests(copy, tests, slow=slow, limit_s=limit_s * len(tests))
        bad = [row for row in ran.rows if row["outcome"] not in ("passed", "skipped")]
        if bad:
            print(ran.output, file=sys.stderr)
            raise UserError(
                f"without any bug {bad[0]['test']} fails ({headline(bad[0]['message'])}): it proves nothing",
                fix="make the tests pass first",
            )
        if ran.timed_out or not ran.rows:
            raise UserError(f"without any bug the tests do not run: {ran.output}", fix="run them by themselves")
        passed |= {row["test"] for row in ran.rows if row["outcome"] == "passed"}
    for mutant in mutants:
        if not any(_is_of(name, test) for name in passed for test in mutant.tests):
            raise UserError(
                f"{mutant.name}: none of its tests runs here ({', '.join(mutant.tests)})",
                where=TABLE,
                fix="install what they need, say slow: true, or name others",
            )


def _is_of(name: str, test: str) -> bool:
    """Returns whether the node id ``name`` belongs to ``test``, a file or a node id."""
    return name == test or name.startswith((f"{test}::", f"{test}["))


def try_mutant(copy: Path, mutant: Mutant, *, limit_s: float) -> Outcome:
    """Plants the bug, runs its tests, and restores the file."""
    path = copy / mutant.file
    sound = path.read_text()
    path.write_text(mutant.planted(copy))
    began = time.monotonic()
    try:
        ran = run_tests(copy, mutant.tests, slow=mutant.slow, limit_s=limit_s, words=["-x"])
    finally:
        path.write_text(sound)
    seconds = time.monotonic() - began
    failed = next((row for row in ran.rows if row["outcome"] not in ("passed", "skipped")), None)
    if failed is not None and failed["outcome"] == "not collected":
        return Outcome(mutant, BROKEN, seconds, failed["test"], "the code does not import, which no test is needed for")
    if failed is not None:
        message = headline(failed["message"])
        verdict = TIMED_OUT if message.startswith("Failed: Timeout") else CAUGHT  # pytest-timeout's words
        return Outcome(mutant, verdict, seconds, failed["test"], message)
    if ran.timed_out:
        return Outcome(mutant, TIMED_OUT, seconds, message=f"ended after {limit_s:g} s")
    if not any(row["outcome"] == "passed" for row in ran.rows):
        return Outcome(mutant, BROKEN, seconds, message=f"no test ran: {ran.output[-200:]}")
    return Outcome(mutant, SURVIVED, seconds)


def headline(message: str) -> str:
    """Returns the first line with the error; of several ranks' tracebacks, the error of the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in message:
        errors = [line for line in lines if line.partition(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
        lines = errors[1:] or errors or lines  # the first is the test's own, which quotes the ranks' tracebacks
    return lines[0] if lines else ""


# -- the whole table ---------------------------------------------------------------------------------


def try_all(root: Path, mutants: Sequence[Mutant], *, jobs: int, limit_s: float, keep_going: bool) -> Iterator[Outcome]:
    """Yields outcomes as they finish, ``jobs`` at a time, each in its own copy. Raises UserError as the checks do."""
    for mutant in mutants:
        mutant.planted(root)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copy = Path(folder) / str(number)
            copy_checkout(root, copy)
            copies.put(copy)
        check_imports(copy)
        check_unmutated(copy, mutants, limit_s=limit_s)

        def one(mutant: Mutant) -> Outcome:
            copy = copies.get()
            try:
                return try_mutant(copy, mutant, limit_s=limit_s)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            futures: list[Future[Outcome]] = [pool.submit(one, mutant) for mutant in mutants]
            try:
                for future in as_completed(futures):
                    outcome = future.result()
                    yield outcome
                    if outcome.verdict in (SURVIVED, BROKEN) and not keep_going:
                        return
            finally:
                for future in futures:
                    future.cancel()
                for process in list(_RUNNING):
                    _end(process)


def markdown(outcomes: Iterable[Outcome]) -> str:
    """Returns the outcomes as a Markdown table."""
    head = "| name | bug | | caught by | s | what it said |\n|---|---|---|---|---|---|\n"
    rows = []
    for outcome in outcomes:
        mutant, test, said = outcome.mutant, outcome.test, outcome.message.replace("|", "\\|").replace("`", "'")
        cells = mutant.name, mutant.bug, outcome.verdict, test and f"`{test}`", f"{outcome.seconds:.0f}", said[:160]
        rows.append(f"| {' | '.join(cells)} |\n")
    return head + "".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which bugs; default: all")
    parser.add_argument("--list", action="store_true", help="print the table and end")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once, each in a copy of its own")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first that survives")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a bug's tests are ended: a hang")
    parser.add_argument("--out", type=Path, help="write the results into this file, as a Markdown table")
    arguments = parser.parse_args(argv)
    table = {mutant.name: mutant for mutant in read_table(ROOT)}
    for name in arguments.names:
        if name not in table:
            raise UserError(f"no mutant is called {name!r}", where=TABLE, fix="--list shows their names")
    chosen = [table[name] for name in arguments.names or table]
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name:28} {mutant.bug}\n{'':28} {' '.join(mutant.tests)}{' (slow)' if mutant.slow else ''}")
        return 0
    outcomes: list[Outcome] = []
    for outcome in try_all(ROOT, chosen, jobs=arguments.jobs, limit_s=arguments.limit, keep_going=arguments.keep_going):
        outcomes.append(outcome)
        said = f"{outcome.test}  {outcome.message[:120]}".strip()
        print(f"{outcome.mutant.name:28} {outcome.verdict:10} {outcome.seconds:5.0f} s  {said}", flush=True)
        if arguments.out is not None:
            arguments.out.write_text(markdown(sorted(outcomes, key=lambda each: chosen.index(each.mutant))))
    caught = sum(outcome.verdict in (CAUGHT, TIMED_OUT) for outcome in outcomes)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that child processes are ended too
    run_command(main)
