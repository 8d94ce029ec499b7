"""docs/faults.md, from the tests that are marked with a fault: ``python -m tests.faults.table > docs/faults.md``.

    @pytest.mark.fault("checkpoints", "one byte of the newest checkpoint is flipped", "the run resumes from …")

A test may have several marks, and may be anywhere in tests/. Files are parsed, not imported. ``pytest -m fault`` runs
them all.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]

# The first word of a mark, and the headline over its rows.
KINDS = {
    "processes": "Processes that die or stop",
    "signals": "Signals",
    "checkpoints": "Damaged checkpoints",
    "disks": "Full disks",
    "data": "Shards and clips",
    "training": "Losses and gradients",
    "launches": "Launches, run folders, clocks",
    "hostile": "Files that others have prepared",
}

HEAD = """# Faults

What happens to a run when something breaks, and the test that breaks it. Every fault ends in one of two ways: the run
goes on by itself from its last good checkpoint, to the same bits; or a command ends with one error that names what is
wrong, and an exit code that is not 0. No fault may end in a hang, a silent start from the beginning, a damaged file, or
the execution of code from a file.

Faults of processes were tested with gloo on CPUs. With NCCL the same is expected only by reading its code, as
[slurm.md](slurm.md#which-rank-it-was) says.

The messages are explained in [troubleshooting.md](troubleshooting.md), what a run writes in [launch.md](launch.md).
`python -m pytest -m fault` runs all of these tests. `python benchmarks/kills.py` kills a run at random moments for as
long as you like, and compares it with an undisturbed one.

This page is generated from the tests: `python -m tests.faults.table > docs/faults.md`.
"""


@dataclass(frozen=True)
class Fault:
    """One row: a key of KINDS, what breaks, what the user sees, and the test."""

    kind: str
    breaks: str
    then: str
    file: Path
    test: str


def faults(folder: Path = TESTS) -> list[Fault]:
    """Returns the faults of all tests below a folder, by file and line. Raises ValueError for a mark that is none."""
    return [fault for file in sorted(folder.rglob("test_*.py")) for fault in _of_file(file)]


def _of_file(file: Path) -> Iterator[Fault]:
    text = file.read_text()
    if "mark.fault(" not in text:
        return
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if not (isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault"):
                continue
            words = [ast.literal_eval(word) for word in mark.args]
            if len(words) != 3 or words[0] not in KINDS or mark.keywords:
                raise ValueError(f"{file}:{mark.lineno}: give one of {', '.join(KINDS)}, what breaks, what happens")
            yield Fault(*words, file, node.name)


def page() -> str:
    """Returns docs/faults.md."""
    found = faults()
    lines = [HEAD]
    for kind, headline in KINDS.items():
        rows = [fault for fault in found if fault.kind == kind]
        if rows:
            lines += [f"## {headline}\n", "| fault | what happens | test |", "|---|---|---|"]
            lines += [f"| {row.breaks} | {row.then} | {_link(row)} |" for row in rows]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _link(fault: Fault) -> str:
    return f"[{fault.test.removeprefix('test_')}](../tests/{fault.file.relative_to(TESTS)})"


if __name__ == "__main__":
    print(page(), end="")
