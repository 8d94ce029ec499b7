"""tools/mutants.py: its table fits the code and the tests of today, and what it says of bugs is so."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vjepa_scale.core.errors import UserError

ROOT = Path(__file__).parents[2]
TABLE: dict[str, dict[str, Any]] = {
    name: entry
    for path in sorted((ROOT / "tools").glob("mutants*.toml"))
    for name, entry in tomllib.loads(path.read_text()).items()
}


@pytest.mark.parametrize("name", TABLE)
def test_an_entry_fits_the_code_and_the_tests(name: str) -> None:
    entry = TABLE[name]
    text = (ROOT / entry["file"]).read_text()
    assert text.count(entry["old"]) == 1, "stale: bring it up to date with the code"
    mutated = text.replace(entry["old"], entry["new"])
    assert mutated != text, "it changes nothing"
    if entry["file"].endswith(".py"):
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text)), "it changes nothing"
    assert entry["tests"]
    for test in entry["tests"]:
        file, _, rest = test.partition("::")
        functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
        found = [function for function in functions if function.startswith("test_")]
        assert rest.partition("[")[0] in (found if rest else [""]), f"{test}: stale: no such test"
        assert found, f"{file} has no tests"


# -- the tool, on a checkout of three functions ------------------------------------------------------

SUMS = """
def plus(a, b):
    return a + b

def times(a, b):
    return a * b

def never():
    return "never"
"""
TESTS = """
import subprocess, sys
import pytest
from vjepa_scale import sums

def test_plus():
    assert sums.plus(1, 2) == 3

def test_times_in_another_process_elsewhere():
    line = "from vjepa_scale.sums import times; print(times(2, 3))"
    assert subprocess.run([sys.executable, "-c", line], cwd="/", capture_output=True, text=True).stdout == "6\\n"

@pytest.mark.skip
def test_skipped():
    pass
"""
FAILS = "def test_fails():\n    assert 1 == 2, 'as ever'\n"
ENTRY = "[{name}]\nbug = 'a bug'\nfile = 'vjepa_scale/sums.py'\nold = '{old}'\nnew = '{new}'\ntests = ['{test}']\n"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/mutants.py, for a checkout of its own."""
    spec = importlib.util.spec_from_file_location("mutants_tool", ROOT / "tools" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants_tool", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins of this environment take time to start
    checkout = tmp_path / "checkout"
    for name, text in {
        "vjepa_scale/__init__.py": "",
        "vjepa_scale/sums.py": SUMS,
        "tests/__init__.py": "",
        "tests/test_sums.py": TESTS,
        "tests/test_fails.py": FAILS,
    }.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    (checkout / "tools").mkdir()
    shutil.copy(ROOT / "tests" / "recorder.py", checkout / "tests")
    subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
    monkeypatch.setattr(module, "ROOT", checkout)
    return module


def write_table(tool: ModuleType, **mutants: tuple[str, str, str]) -> None:
    """name=(old, new, test)"""
    entries = [ENTRY.format(name=name, old=old, new=new, test=test) for name, (old, new, test) in mutants.items()]
    (tool.ROOT / "tools" / "mutants.toml").write_text("".join(entries))


def test_verdicts(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(
        tool,
        minus=("a + b", "a - b", "tests/test_sums.py"),
        elsewhere=("a * b", "a / b", "tests/test_sums.py"),
        harmless=("a + b", "b + a", "tests/test_sums.py"),
        unreadable=("a + b", "a +", "tests/test_sums.py"),
    )
    before = {path: path.read_bytes() for path in tool.ROOT.rglob("*.py")}
    assert tool.main(["--keep-going", "--jobs", "2", "--out", str(tmp_path / "out.md")]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " caught " in lines["minus"]
    assert lines["minus"].split("  ")[-2:] == ["tests/test_sums.py::test_plus", "assert -1 == 3"]
    assert " caught " in lines["elsewhere"]
    assert "test_times_in_another_process_elsewhere" in lines["elsewhere"]
    assert " SURVIVED " in lines["harmless"]
    assert " BROKEN " in lines["unreadable"]
    assert "2 of 4 caught" in lines.values()
    assert {path: path.read_bytes() for path in tool.ROOT.rglob("*.py")} == before
    cells = [row.split(" | ") for row in (tmp_path / "out.md").read_text().splitlines()[2:]]
    assert [(cell[0], cell[2]) for cell in cells] == [
        ("| minus", "caught"),
        ("| elsewhere", "caught"),
        ("| harmless", "SURVIVED"),
        ("| unreadable", "BROKEN"),
    ]
    assert tool.main(["minus"]) == 0


def test_bugs_of_all_tables_have_names_of_their_own(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tool, minus=("a + b", "a - b", "tests/test_sums.py"))
    first = tool.ROOT / "tools" / "mutants.toml"
    (tool.ROOT / "tools" / "mutants_more.toml").write_text(first.read_text().replace("[minus]", "[another]"))
    assert tool.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[::2]] == ["minus", "another"]
    (tool.ROOT / "tools" / "mutants_more.toml").write_text(first.read_text())
    with pytest.raises(UserError, match=r"mutants_more\.toml: another mutant is called 'minus', too"):
        tool.main(["--list"])


def test_a_hang_is_told_from_a_failure(tool: ModuleType) -> None:
    mutant = tool.Mutant(
        "hang",
        "",
        "vjepa_scale/sums.py",
        "return a + b",
        "return plus(a, b) if 0 else __import__('time').sleep(1e6)",
        ("tests/test_sums.py",),
    )
    outcome = tool.try_mutant(tool.ROOT, mutant, limit_s=5.0)
    assert (outcome.verdict, outcome.test) == ("caught (time-out)", "")
    assert (tool.ROOT / "vjepa_scale/sums.py").read_text() == SUMS


@pytest.mark.parametrize(
    ("old", "test", "said"),
    [
        ("a - b", "tests/test_sums.py", "0 times in vjepa_scale/sums.py: the table is stale"),
        ("return", "tests/test_sums.py", "3 times in vjepa_scale/sums.py: the table is stale"),
        ("a + b", "tests/test_fails.py", "test_fails fails (AssertionError: as ever): it proves nothing"),
        ("a + b", "tests/test_sums.py::test_skipped", "none of its tests runs here"),
        ("a + b", "tests/test_sums.py::test_gone", "do not run"),
    ],
)
def test_what_would_prove_nothing_is_refused(tool: ModuleType, old: str, test: str, said: str) -> None:
    write_table(tool, bug=(old, "1", test))
    with pytest.raises(UserError) as error:
        tool.main([])
    assert said in str(error.value)


def test_the_error_of_a_rank_is_what_is_told(tool: ModuleType) -> None:
    message = (
        "AssertionError: -- rank 0: Traceback (most recent call last):\n"
        '    File "processes.py", line 97, in _worker\n'
        "  torch.distributed.Error: it is lost\n-- rank 1: Traceback (most recent call last):\n  ValueError: other"
    )
    assert tool.headline(message) == "torch.distributed.Error: it is lost"
    assert tool.headline("assert 1 == 2\n + where 1 = f()") == "assert 1 == 2"
