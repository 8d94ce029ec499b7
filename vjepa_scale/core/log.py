"""Logging by the standard library's ``logging``, with levels, time stamps and the name of the process.

A process of a job (a rank, its loader workers, a job that makes shards) calls ``set_up`` once and then writes

    2026-11-29 17:00:00.123 info [pretrain rank 0] saved runs/demo/pretrain/checkpoints/step_00000100

debug and info to stdout, warnings and errors to stderr. Records of other packages have the name of their logger after
the process: ``[pretrain rank 0, torch.distributed]``. A command writes plain lines to stderr: ``warning: …``; it
prints its results to stdout and does not log them. In a program that imports the package, the records go to the
program's handlers; where it has none, they are plain lines on stderr.

``VJEPA_LOG`` sets the level: debug, info (the default), warning or error. Of other packages, warnings and errors are
shown; with debug, all records. Does not import PyTorch.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace

VARIABLE = "VJEPA_LOG"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_OURS = "vjepa_scale"
_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (?P<level>[a-z]+) \[(?P<process>[^\]]*)\] ?(?P<text>.*)")


@dataclass(frozen=True)
class Process:
    """The process that logs, and its level. Can be pickled to the workers that it starts.

    name: such as ``pretrain rank 3``; empty: a command or a library, whose lines are plain
    main: it shows Python's warnings (``warnings.warn``), which are the same in all processes of a job
    """

    name: str = ""
    level: int = logging.INFO
    main: bool = True

    def worker(self, number: object) -> "Process":
        """Returns the ``Process`` of a worker of this process."""
        return replace(self, name=f"{self.name} worker {number}") if self.name else self


_process = Process()


def current() -> Process:
    """Returns what the last ``set_up`` of this process has set."""
    return _process


def level_of(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the level of ``VJEPA_LOG``, as a number of ``logging``. Raises UserError for any other word."""
    from vjepa_scale.core.errors import UserError  # which imports this module

    word = environment.get(VARIABLE) or "info"
    if word not in LEVELS:
        raise UserError(f"{word!r} is no level", where=VARIABLE, fix=f"one of {', '.join(LEVELS)}")
    return LEVELS[word]


def set_up(name: str = "", *, main: bool = True) -> None:
    """Logs as the process of this name, at the level of ``VJEPA_LOG``. Call it once per process, before any logging.

    Raises UserError if the variable has another value.
    """
    apply(Process(name, level_of(), main))


def apply(process: Process) -> None:
    """Logs as this process. For workers, which get their ``Process`` from the one that started them."""
    global _process
    _process = process
    ours = logging.getLogger(_OURS)
    ours.handlers[:] = [_Console(process)]
    ours.setLevel(process.level)
    ours.propagate = False
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, _Console)]
    if not process.name:
        return  # the program that imports this package configures other packages' logging
    foreign = process.level if process.level == logging.DEBUG else max(process.level, logging.WARNING)
    console = _Console(process)
    console.setLevel(foreign)  # loggers with their own level ignore the root's
    root.addHandler(console)
    root.setLevel(foreign)
    logging.captureWarnings(True)
    quiet = not process.main and foreign != logging.DEBUG
    logging.getLogger("py.warnings").setLevel(logging.ERROR if quiet else logging.NOTSET)
    adopt()


def adopt() -> None:
    """Routes other packages' records to our handlers. Call it again after importing a package that adds handlers.

    A package's log files stay. PyTorch's own handlers stay if ``TORCH_LOGS`` is set. Does nothing if ``set_up`` named
    no process.
    """
    if not _process.name:
        return
    terminal = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if not isinstance(logger, logging.Logger) or name.partition(".")[0] == _OURS:
            continue
        if name.partition(".")[0] == "torch" and os.environ.get("TORCH_LOGS"):
            continue
        shown = [handler for handler in logger.handlers if getattr(handler, "stream", None) in terminal]
        for handler in shown:
            logger.removeHandler(handler)
        if shown:
            logger.propagate = True


def shown(line: str) -> str | None:
    """Returns a line of a process's log as ``follow`` shows it: without time stamp and process.

    Warnings and errors begin with ``warning: `` and ``error: ``. Returns None for debug and other packages' lines.
    Lines that were not logged (of an earlier version, tracebacks) are returned unchanged.
    """
    found = _LINE.fullmatch(line)
    if found is None:
        return line
    if found["level"] == "debug" or "," in found["process"]:
        return None
    return found["text"] if found["level"] == "info" else f"{found['level']}: {found['text']}"


class _Console(logging.Handler):
    """Writes to the sys.stdout and sys.stderr of the moment at which a record comes.

    fallback: only where no other handler takes the record, as logging.lastResort does
    """

    def __init__(self, process: Process, *, fallback: bool = False) -> None:
        super().__init__()
        self._process, self._fallback = process, fallback

    def emit(self, record: logging.LogRecord) -> None:
        if self._fallback and (logging.getLogger().handlers or logging.getLogger(_OURS).handlers != [self]):
            return
        to_stdout = self._process.name and record.levelno < logging.WARNING
        stream = sys.stdout if to_stdout else sys.stderr
        if record.name.partition(".")[0] == _OURS:
            print(self._text(record), file=stream, flush=True)  # raises on a full disk, as for any other file
            return
        with suppress(OSError):
            print(self._text(record), file=stream, flush=True)

    def _text(self, record: logging.LogRecord) -> str:
        text = self.format(record).rstrip("\n")  # message, and traceback where there is one
        level = record.levelname.lower()
        if not self._process.name:
            plain = record.levelno == logging.INFO
            return text if plain else f"{level}: {text}"
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d}"
        ours = record.name.partition(".")[0] == _OURS
        process = self._process.name if ours else f"{self._process.name}, {record.name}"
        return "\n".join(f"{stamp} {level} [{process}] {line}" for line in text.split("\n"))


class Laps:
    """Host seconds between calls, summed by name. Does not wait for a device."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._then = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the time since the last call to this name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._then
        self._then = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.4f} s" for name, seconds in self.seconds.items())


_annotate: Callable[[str], AbstractContextManager[object]] | None = None
_tell: Callable[[str], object] | None = None


def region(name: str) -> AbstractContextManager[object]:
    """Returns a context whose inside has this name in a profile; without a profiler, one that does nothing."""
    tell(name)
    return nullcontext() if _annotate is None else _annotate(name)


def tell(name: str) -> None:
    """Tells who gets the names of regions that this process goes on with this one, such as long work in it does."""
    if _tell is not None:
        _tell(name)


def tell_regions(listener: Callable[[str], object] | None) -> None:
    """Sets who gets the name of each ``region`` as it begins; None: nobody. One per process."""
    global _tell
    _tell = listener


def annotate_by(annotate: Callable[[str], AbstractContextManager[object]] | None) -> None:
    """Sets how ``region`` names what is inside, such as ``torch.profiler.record_function``; None: not at all."""
    global _annotate
    _annotate = annotate


def _start_in_a_program() -> None:
    """At import, before ``set_up`` says what this process is. What the program has set already stays."""
    ours = logging.getLogger(_OURS)
    if ours.level == logging.NOTSET:
        ours.setLevel(LEVELS.get(os.environ.get(VARIABLE, ""), logging.INFO))  # commands refuse other words
    ours.addHandler(_Console(_process, fallback=True))


_start_in_a_program()
