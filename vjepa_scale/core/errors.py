"""The one exception for mistakes a user can mend, and how a command line reports it."""

import errno
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

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

    The line is a UserError's, or names the path that the operating system refused. Ctrl-C is 130.
    """
    try:
        return command() or 0
    except UserError as error:
        _say(f"error: {error}")
        return EXIT_USER_ERROR
    except OSError as error:  # a full disk, a folder that may not be written: the user's to mend, where it has a path
        if error.filename is None and error.errno not in FULL:
            raise
        _say(f"error: {error.filename or 'a file cannot be written'}: {error.strerror or error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130


def _say(line: str) -> None:
    with suppress(OSError):  # standard error may be a file on the disk that is full: the exit code stays
        print(line, file=sys.stderr, flush=True)
