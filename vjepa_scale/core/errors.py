"""The one exception for mistakes a user can mend, and how a command line reports it."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from vjepa_scale.core import log

EXIT_USER_ERROR = 2
# What the system says of a write where the disk, the quota or the largest file that it allows is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# sysexits.h EX_TEMPFAIL: a rank obeyed a signal and has saved; the same command goes on.
EXIT_SAVED = 75


class UserError(Exception):
    """A mistake in what the user gave: a recipe, a folder, a checkpoint.

    what:  one sentence: what is wrong.
    where: ``file:key`` or a path: the place to look.
    fix:   what would work.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f"{where}: " if where is not None else ""
        remedy = f" ({fix})" if fix else ""
        super().__init__(f"{place}{what}{remedy}".replace("\n", " "))

    def __reduce__(self) -> tuple:  # keyword-only arguments do not survive pickling by themselves
        return _rebuild, (type(self), self.what, self.where, self.fix)


class PassingError(UserError):
    """One that may pass by itself, such as a file server that does not answer: a stage is worth another attempt."""


def _rebuild(kind: type[UserError], what: str, where: object, fix: str | None) -> UserError:
    return kind(what, where=where, fix=fix)


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Run a command line and leave the process with ``exit_code`` of it."""
    sys.exit(exit_code(command))


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command line; what its process should end with: 0, what it returned, or 2 with one line on stderr.

    The line is a UserError's, or names the path that the operating system refused, or where the code was when the
    system gave no path. Ctrl-C is 130.
    """
    try:
        log.set_up()
        code = command() or 0
        _flush_output()
        return code
    except UserError as error:
        _say(f"error: {error}")
        return EXIT_USER_ERROR
    except OSError as error:  # a full disk, a folder that may not be written, a file server that fails
        _say(f"error: {_place_of(error)}: {reason_of(error)}")
        with suppress(OSError):  # where it was standard output that failed
            _flush_output()
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130


def reason_of(error: OSError) -> str:
    """The system's words for an error. NumPy's writes raise one without a number: then its own words."""
    if error.strerror:
        return error.strerror
    return str(error.args[0]) if error.args else type(error).__name__


def _place_of(error: OSError) -> str:
    if error.filename is not None:
        return str(error.filename)
    package = Path(__file__).parents[1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    at = f" ({Path(ours[-1].filename).relative_to(package.parent)}:{ours[-1].lineno})" if ours else ""
    return ("a file cannot be written" if error.errno in FULL else "the system refused a read or write") + at


def _flush_output() -> None:
    """Write what was printed. Python itself does so only at its exit, and ends with code 120 where that fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        error.filename = error.filename or "standard output"
        with suppress(OSError, ValueError):  # else Python tries again at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _say(line: str) -> None:
    with suppress(OSError):  # standard error may be a file on the disk that is full: the exit code stays
        print(line, file=sys.stderr, flush=True)
