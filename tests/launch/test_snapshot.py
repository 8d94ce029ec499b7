"""The copy of the code that jobs import, and what is recorded of the checkout it came from."""

import filecmp
import getpass
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import LIMIT_S

PACKAGE = Path(__file__).parents[2] / "vjepa_scale"
NO_CACHE = shutil.ignore_patterns("__pycache__", ".*")
SNAPSHOT = "import sys; from pathlib import Path; from vjepa_scale.launch.snapshot import *; run = Path(sys.argv[1])\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of its own, to be edited; ``vjepa_scale.where`` says which copy runs."""
    folder = tmp_path / "check out"
    shutil.copytree(PACKAGE, folder / "vjepa_scale", ignore=NO_CACHE)
    (folder / "vjepa_scale" / "where.py").write_text("print('first', __file__)\n")
    return folder


def command(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", SNAPSHOT + code, *map(str, arguments)]


def environment(checkout: Path, **more: str) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**inherited, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1", **more}


def run(checkout: Path, code: str, *arguments: object, cwd: str | Path = "/", **more: str) -> str:
    """What a Python prints that imports from a checkout."""
    env = environment(checkout, **more)
    done = subprocess.run(command(code, *arguments), cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def same_files(left: Path, right: Path) -> bool:
    """The same names with the same bytes, caches aside."""

    def names(folder: Path) -> list[Path]:
        found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        return sorted(path for path in found if "__pycache__" not in path.parts)

    files = names(left)
    return files == names(right) and all(filecmp.cmp(left / file, right / file, shallow=False) for file in files)


# -- the copy --------------------------------------------------------------------------------------


def test_jobs_import_the_copy_wherever_they_start(checkout: Path, tmp_path: Path) -> None:
    runs = tmp_path / "it's $HOME" / "run"
    folder = Path(run(checkout, "print(snapshot_code(run))", runs))
    assert folder.parent == runs / "code"
    assert same_files(folder / "vjepa_scale", checkout / "vjepa_scale")
    lines = run(checkout, "print('\\n'.join(import_lines(snapshot_code(run))))", runs)

    (checkout / "vjepa_scale" / "where.py").write_text("print('edited', __file__)\n")
    for start in (tmp_path, checkout):  # python -m prefers the folder that it starts in
        python = shlex.quote(sys.executable)
        job = f"{lines}\n{python} -m vjepa_scale.where; {python} -c 'import extra'"
        (tmp_path / "extra.py").touch()
        for given in ({}, {"PYTHONPATH": str(tmp_path)}):  # what a module put there stays
            env = {"PATH": os.environ["PATH"], **given}
            done = subprocess.run(["bash", "-c", job], cwd=start, env=env, capture_output=True, text=True)
            assert done.stdout == f"first {folder}/vjepa_scale/where.py\n", done.stderr
            assert ("No module named 'extra'" in done.stderr) == (not given)

    # The imports left caches in the copy: it is still the same, and the edited code gets a copy of its own.
    assert any(folder.rglob("__pycache__"))
    other = Path(run(checkout, "print(snapshot_code(run))", runs))
    assert other.parent == folder.parent
    assert other != folder
    (checkout / "vjepa_scale" / "where.py").write_text("print('first', __file__)\n")
    before = folder.stat().st_ino
    assert run(checkout, "print(snapshot_code(run))", runs) == str(folder)
    assert folder.stat().st_ino == before


def test_the_digest_is_of_names_and_bytes(checkout: Path, tmp_path: Path) -> None:
    package = checkout / "vjepa_scale"

    def digest() -> str:
        return run(checkout, "print(code_digest())", tmp_path)

    first = digest()
    assert len(first) == 12
    int(first, 16)
    seen = {first}

    def changed(change: Callable[[], object]) -> None:
        change()
        assert digest() not in seen
        seen.add(digest())

    changed(lambda: (package / "new.py").touch())
    changed(lambda: (package / "new.py").rename(package / "nex.py"))
    changed(lambda: (package / "nex.py").write_text("a"))
    changed(lambda: (package / "py.typed").touch())
    (package / "nex.py").unlink()
    (package / "py.typed").unlink()
    (package / ".where.py.swp").write_text("an editor's")
    (package / "gone.py").unlink(missing_ok=True)
    (package / ".#lock.py").symlink_to("nowhere")
    assert digest() == first
    shutil.copytree(package, tmp_path / "elsewhere" / "vjepa_scale", ignore=NO_CACHE)
    assert run(tmp_path / "elsewhere", "print(code_digest())", tmp_path) == first

    assert run(checkout, "print(code_folder(run))", tmp_path / "run") == str(tmp_path / "run" / "code" / first)
    assert not (tmp_path / "run").exists()
    assert run(checkout, "print(code_folder(run))", "relative", cwd=tmp_path) == f"{tmp_path}/relative/code/{first}"


@pytest.mark.fault(
    "launches",
    "several launches at the same moment",
    "each has its own record and a whole copy of the code",
)
def test_several_launches_at_once(checkout: Path, tmp_path: Path) -> None:
    start = time.time() + 1.0
    code = f"import time; time.sleep(max(0, {start} - time.time())); print(snapshot_code(run), new_launch_folder(run))"
    processes = [
        subprocess.Popen(
            command(code, tmp_path / "run"), env=environment(checkout), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(6)
    ]
    ends = [process.communicate(timeout=LIMIT_S) for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, ends
    (folder,) = (tmp_path / "run" / "code").iterdir()  # no temporary one is left
    assert same_files(folder / "vjepa_scale", checkout / "vjepa_scale")
    launches = [f"{tmp_path}/run/launches/{number:04d}" for number in range(1, 7)]
    assert sorted(out.decode().strip() for out, _ in ends) == [f"{folder} {launch}" for launch in launches]


def test_launch_folders_are_numbered_on(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "launches" / "0041").mkdir(parents=True)
    (tmp_path / "launches" / "notes").mkdir()
    assert run(checkout, "print(new_launch_folder(run))", tmp_path) == str(tmp_path / "launches" / "0042")
    assert run(checkout, "print(new_launch_folder(run))", tmp_path) == str(tmp_path / "launches" / "0043")


def test_a_half_copy_is_not_used(checkout: Path, tmp_path: Path) -> None:
    kill = """
import os
write, count = Path.write_bytes, iter(range(20))
def write_bytes(path, data):
    write(path, data)
    if next(count, None) is None:
        os.kill(os.getpid(), 9)
Path.write_bytes = write_bytes
"""
    done = subprocess.run(command(kill + "snapshot_code(run)", tmp_path / "run"), env=environment(checkout))
    assert done.returncode == -signal.SIGKILL
    (half,) = (tmp_path / "run" / "code").iterdir()
    assert len(list(half.rglob("*.py"))) >= 20
    folder = Path(run(checkout, "print(snapshot_code(run))", tmp_path / "run"))
    assert folder != half
    assert same_files(folder / "vjepa_scale", checkout / "vjepa_scale")


@pytest.mark.fault(
    "launches",
    "a run's copy of the code is damaged",
    "it is made again",
)
def test_a_damaged_copy_is_made_anew(checkout: Path, tmp_path: Path) -> None:
    folder = Path(run(checkout, "print(snapshot_code(run))", tmp_path))
    for damage in (
        lambda: (folder / "vjepa_scale" / "where.py").unlink(),
        lambda: (folder / "vjepa_scale" / "where.py").write_text("print('by hand')"),
        lambda: (folder / "vjepa_scale" / "extra.py").touch(),
        lambda: shutil.rmtree(folder / "vjepa_scale"),
    ):
        damage()
        assert run(checkout, "print(snapshot_code(run))", tmp_path) == str(folder)
        assert same_files(folder / "vjepa_scale", checkout / "vjepa_scale")
    assert list(folder.parent.iterdir()) == [folder]


def test_a_run_folder_that_pythonpath_cannot_hold(checkout: Path, tmp_path: Path) -> None:
    code = "try: snapshot_code(run)\nexcept Exception as error: print(type(error).__name__, error)"
    said = run(checkout, code, tmp_path / "a:b")
    assert said.startswith(f"UserError {tmp_path / 'a:b'}: ")
    assert not (tmp_path / "a:b").exists()


# -- git -------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    """Plain git, with no settings but a name to commit as."""
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=trunk", "-c", "safe.directory=*"]
    done = subprocess.run(["git", *names, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repository(checkout: Path) -> Path:
    (checkout / ".gitignore").write_text("__pycache__/\n*.ignored.py\n")
    (checkout / "notes.txt").write_text("first\n")
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "one")
    return checkout


def state_of(checkout: Path, **more: str) -> tuple[dict[str, Any], str]:
    code = "import json; print(json.dumps(source_state()))"
    state, patch = json.loads(run(checkout, code, "the run", **more))
    return state, patch


def test_a_clean_checkout(repository: Path) -> None:
    os.utime(repository / "vjepa_scale" / "__init__.py", (1, 1))  # touched is not changed
    state, patch = state_of(repository)
    assert state["commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert state["branch"] == "trunk"
    assert (state["dirty"], state["untracked"], state["git_error"], patch) == (False, [], None, "")
    assert state["python"] == ".".join(map(str, sys.version_info[:3]))
    shown = subprocess.run([sys.executable, "-m", "pip", "show", "torch"], capture_output=True, text=True).stdout
    assert f"Version: {state['torch']}\n" in shown
    assert state["command"][0] == sys.executable
    assert state["command"][-1] == "the run"
    assert (state["folder"], state["host"], state["user"]) == ("/", socket.gethostname(), getpass.getuser())
    assert state["time"].endswith("+00:00")
    assert state["code_digest"] == run(repository, "print(code_digest())", "x")


def test_commit_and_patch_give_the_code_that_ran(repository: Path, tmp_path: Path) -> None:
    package = repository / "vjepa_scale"
    with open(package / "core" / "files.py", "a") as file:
        file.write("# θ, edited\n")
    (package / "where.py").unlink()
    (package / "demo" / "summary.py").rename(package / "demo" / "moved.py")  # untracked under its new name
    (package / "staged.py").write_text("staged = True\n")
    git(repository, "add", "vjepa_scale/staged.py")
    (package / "new folder").mkdir()
    (package / "new folder" / "new é.py").write_text("no_line_end = True")
    (package / "tool.sh").write_text("echo\n")
    (package / "left.ignored.py").write_text("")
    (repository / "notes.txt").write_text("second\n")
    (repository / "outside.py").write_text("not of the package\n")

    settings = tmp_path / "home" / ".gitconfig"  # each of them alone would spoil a patch
    settings.parent.mkdir()
    settings.write_text(
        "[color]\nui = always\n[diff]\nnoprefix = true\nexternal = false\nrelative = true\n[core]\npager = false\n"
        f"excludesFile = {tmp_path}/excluded\n"
        "[status]\nshowUntrackedFiles = no\n"
    )
    (tmp_path / "excluded").write_text("tool.sh\n")
    state, patch = state_of(repository, HOME=str(settings.parent), GIT_DIR="/nonexistent", GIT_EXTERNAL_DIFF="false")
    assert state["git_error"] is None
    assert state["commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert state["dirty"] is True
    untracked = git(repository, "-c", "core.quotePath=false", "ls-files", "--others", "--exclude-standard").splitlines()
    assert state["untracked"] == sorted(set(untracked) - {"outside.py"})
    assert len(state["untracked"]) == 3

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    (tmp_path / "source.patch").write_text(patch)
    git(clone, "apply", str(tmp_path / "source.patch"))
    (package / "left.ignored.py").unlink()
    assert same_files(clone / "vjepa_scale", package)
    assert (clone / "notes.txt").read_text() == "second\n"


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    git(repository, "checkout", "--quiet", "--detach")
    state, _ = state_of(repository)
    assert state["commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert state["branch"] is None


def test_where_git_says_nothing(checkout: Path, tmp_path: Path) -> None:
    def refused(expected: str, **more: str) -> None:
        state, patch = state_of(checkout, **more)
        assert (state["commit"], state["branch"], state["dirty"], patch) == (None, None, None, "")
        assert expected in state["git_error"]
        assert len(state["code_digest"]) == 12

    refused("not a git repository")
    refused("git cannot be run: No such file or directory", PATH=str(tmp_path))
    git(checkout, "init", "--quiet")
    (checkout / ".gitignore").write_text("vjepa_scale\n")  # installed into some project's environment, say
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "another project")
    refused("not under version control")


def test_a_repository_without_a_commit(checkout: Path) -> None:
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    state, patch = state_of(checkout)
    assert (state["commit"], patch) == (None, "")
    assert state["git_error"]


def test_a_checkout_of_somebody_else(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD").strip()
    if os.getuid() == 0:  # only root can give files away
        os.chown(repository, 65534, 65534)
        os.chown(repository / ".git", 65534, 65534)
        state, _ = state_of(repository)
        assert state["commit"] is None
        assert "dubious ownership" in state["git_error"]
    (tmp_path / ".gitconfig").write_text(f"[safe]\ndirectory = {repository}\n")
    state, _ = state_of(repository, HOME=str(tmp_path))  # its user trusts it
    assert (state["commit"], state["git_error"]) == (commit, None)
