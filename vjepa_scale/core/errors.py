"""The exception type for user errors, and how a command line reports it."""

import errno
import os
import select
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from vjepa_scale.core import log

EXIT_USER_ERROR = 2
# errno values of a write for which there is no space: disk full, quota exceeded, file too large.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# 128 + SIGPIPE, as a shell reports programs that this signal ends. 1 is in use: ``status`` returns it for a failed run.
EXIT_CLOSED_PIPE = 141
# sysexits.h EX_TEMPFAIL: a rank saved and stopped after a signal; the same command resumes.
EXIT_SAVED = 75


class UserError(Exception):
    """An error in the user's input: a recipe, a folder, a checkpoint.

    what:  one sentence: what is wrong.
    where: ``file:key`` or a path: the location of the error.
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
    """A user error that may be temporary, such as a file server that does not answer: the stage is restarted."""


class OutsideError(PassingError):
    """Something outside this program ended a part of it, as SIGKILL does: the same may happen twice at one step."""


def _rebuild(kind: type[UserError], what: str, where: object, fix: str | None) -> UserError:
    return kind(what, where=where, fix=fix)


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Runs a command line and ends the process with its ``exit_code``."""
    sys.exit(exit_code(command))


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command line and returns the exit code for its process.

    The code is what the command returned (0 for None), 130 after Ctrl-C, or 2 after an error, with one line on stderr.
    If the reader of standard output has closed it (``| head -1``), the code is 141, without a line.
    The line has the UserError's message, or the path that the operating system refused; if the system gave no path,
    the line of code.
    """
    try:
        log.set_up()
        code = command() or 0
        _flush_output()
        return code
    except UserError as error:
        _say(f"error: {error}")
        return EXIT_USER_ERROR
    except SystemExit:  # argparse has printed its help
        if _output_is_closed():
            _discard_output()
        raise
    except OSError as error:  # a full disk, a folder that may not be written, a file server that fails
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            _discard_output()
            return EXIT_CLOSED_PIPE
        _say(f"error: {_place_of(error)}: {reason_of(error)}")
        with suppress(OSError):  # standard output itself may have failed
            _flush_output()
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130


def reason_of(error: OSError) -> str:
    """Returns the system's message of an error. NumPy's writes raise an OSError without errno: then its own text."""
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
    """Flushes standard output. Python itself does so only at its exit, and ends with code 120 if that fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        error.filename = error.filename or "standard output"
        if not (isinstance(error, BrokenPipeError) and _output_is_closed()):
            _discard_output()
        raise


def _discard_output() -> None:
    """Sends the rest of standard output to /dev/null. Otherwise Python writes it at its exit, and fails again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_is_closed() -> bool:
    """Returns whether standard output is a pipe that nobody reads. Other broken pipes are errors."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # no stdout, or one without a file
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _say(line: str) -> None:
    with suppress(OSError):  # standard error may be a file on the full disk: the exit code does not change
        print(line, file=sys.stderr, flush=True)
