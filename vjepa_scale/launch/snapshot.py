"""Copies the code that jobs run, and records the state of its checkout.

A stage may wait in the queue for days. Its jobs import the copy, so that later edits do not affect them.
"""

import contextlib
import getpass
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import vjepa_scale
from vjepa_scale.core.errors import UserError, reason_of
from vjepa_scale.core.files import publish_dir, remove_dir, writing

GIT_TIMEOUT_S = 10.0
PATCH_LIMIT = 16 * 2**20  # bytes

# -- the copy --------------------------------------------------------------------------------------


def code_digest() -> str:
    """Returns a digest of 12 hex digits over the names and bytes of the running package's files."""
    return _digest(_files(_package()))


def code_folder(run_folder: Path) -> Path:
    """Returns the folder of ``snapshot_code``'s copy. Writes nothing."""
    return _folder(run_folder, code_digest())


def snapshot_code(run_folder: Path) -> Path:
    """Copies the running package to ``<run>/code/<digest>/vjepa_scale``, unless it exists already.

    Returns the folder for PYTHONPATH. The copy gets its name by one rename, so it is complete; several processes may
    do this at once.
    """
    files = _files(_package())
    digest = _digest(files)
    final = _folder(run_folder, digest)
    while not _is_whole(final, digest):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{digest}.", suffix=".tmp", dir=final.parent))
        try:
            temporary.chmod(final.parent.stat().st_mode & 0o7777)  # mkdtemp's mode is 0700
            _write(temporary / vjepa_scale.__name__, files)
            if final.exists() and not _is_whole(final, digest):  # it was edited, or files were removed
                remove_dir(final)
            publish_dir(temporary, final)
        except OSError:
            if not _is_whole(final, digest):  # otherwise another process was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def import_lines(folder: Path) -> list[str]:
    """Returns lines of bash after which Python imports vjepa_scale from a folder, whatever the current folder.

    ``python -m`` searches the current folder before PYTHONPATH, and most launches are made in a checkout.
    """
    return [
        f"export PYTHONPATH={shlex.quote(str(folder))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
    ]


def _package() -> Path:
    return Path(vjepa_scale.__file__).absolute().parent


def _folder(run_folder: Path, digest: str) -> Path:
    folder = Path(run_folder).absolute() / "code" / digest
    if ":" in str(folder):
        raise UserError("a colon separates folders in PYTHONPATH", where=run_folder, fix="a run folder without one")
    return folder


def _files(package: Path) -> dict[str, bytes]:
    """Returns relative name → bytes of every file except caches and hidden ones. Read once for both digest and copy."""
    found: dict[str, bytes] = {}
    for folder, folders, names in os.walk(package):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found[path.relative_to(package).as_posix()] = path.read_bytes()
    return dict(sorted(found.items()))


def _digest(files: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, content in files.items():
        total.update(f"{len(name.encode())} {name} {len(content)} ".encode() + content)
    return total.hexdigest()[:12]


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return _digest(_files(folder / vjepa_scale.__name__)) == digest
    except OSError:  # it is being replaced
        return False


def _write(package: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            path.write_bytes(content)


# -- the launch ------------------------------------------------------------------------------------


def new_launch_folder(run_folder: Path) -> Path:
    """Creates ``<run>/launches/0001``, or the next free number."""
    launches = Path(run_folder) / "launches"
    launches.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in launches.iterdir() if path.name.isdigit()), default=0)
    while True:
        number += 1
        folder = launches / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another launch has just created it
            continue
        return folder


def source_state() -> tuple[dict[str, Any], str]:
    """Returns (facts for source.json, patch for source.patch): what ran, and from which commit.

    The patch has the differences of tracked files from the commit, and the package's untracked files. Facts that git
    cannot give are null, and ``git_error`` has the reason.
    """
    git, patch = _git_state()
    state = {
        **git,
        "code_digest": code_digest(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "command": list(sys.orig_argv),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "user": _user(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return state, patch


_PLAIN = ("--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")


class _NoGit(Exception):
    """Git gives no information; the message is the reason."""


def _git_state() -> tuple[dict[str, Any], str]:
    state: dict[str, Any] = {"commit": None, "branch": None, "dirty": None, "untracked": [], "git_error": None}
    patch = ""
    try:
        top = Path(_git("rev-parse", "--show-toplevel", at=_package()).removesuffix("\n"))
        name = os.path.relpath(_package().resolve(), top.resolve())
        if not _git("ls-files", "--", f"{name}/__init__.py", at=top):
            raise _NoGit(f"the package is not under version control in {top}")  # e.g. installed into .venv
        state["commit"] = _git("rev-parse", "--verify", "HEAD", at=top).strip()
        state["branch"] = _git("symbolic-ref", "--short", "--quiet", "HEAD", at=top, accepted=(0, 1)).strip() or None
        # Only the package's untracked files: a checkout may have a million others in its data folder.
        untracked = _git("ls-files", "-z", "--others", "--exclude-standard", "--", f"{name}/", at=top)
        state["untracked"] = [file for file in untracked.split("\0") if file]
        patch = _git("diff", *_PLAIN, "HEAD", at=top)
        for file in state["untracked"]:
            patch += _git("diff", *_PLAIN, "--no-index", "--", "/dev/null", file, at=top, accepted=(0, 1))
        state["dirty"] = bool(patch)
    except _NoGit as error:
        state["git_error"] = str(error)
    return state, patch


def _git(*arguments: str, at: Path, accepted: tuple[int, ...] = (0,)) -> str:
    """Runs git without the user's settings. Returns the first PATCH_LIMIT bytes of its output. Raises _NoGit."""
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=at,
                env=_git_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=GIT_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise _NoGit(f"git {arguments[0]} took longer than {GIT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise _NoGit(f"git cannot be run: {reason_of(error)}") from None
        if done.returncode not in accepted:
            said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
            raise _NoGit(said or f"git {arguments[0]} ended with status {done.returncode}")
        output.seek(0)
        text = output.read(PATCH_LIMIT).decode(errors="replace")
        return f"{text}\n(cut here, after {PATCH_LIMIT} bytes)\n" if output.read(1) else text


@cache
def _git_environment() -> dict[str, str]:
    """Returns an environment without git settings of the user or the machine, except safe.directory."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    trusted = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        trusted = subprocess.run(
            ["git", "config", "--null", "--get-all", "safe.directory"],
            cwd="/",
            env=own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
        ).stdout
    folders = [folder for folder in trusted.split("\0") if folder]
    own |= {
        "LC_ALL": "C",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_COUNT": str(len(folders)),
    }
    for number, folder in enumerate(folders):
        own |= {f"GIT_CONFIG_KEY_{number}": "safe.directory", f"GIT_CONFIG_VALUE_{number}": folder}
    return own


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())
