"""Send the rows of a stage's metrics.jsonl to Weights & Biases and TensorBoard, in processes of their own.

    rank 0 ──── metrics.jsonl ────> publisher of wandb       ──> RUN/STAGE/wandb, or a server
       └─ a pipe: what, exit code ─> publisher of tensorboard ──> RUN/STAGE/tensorboard

A publisher follows the file; the trainer does not know it. So a sink that hangs, fails or is missing delays no step.
The pipe ends with the process that started the publisher, however that ends. Without PyTorch.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vjepa_scale.core import log
from vjepa_scale.core.errors import EXIT_SAVED, EXIT_USER_ERROR, UserError
from vjepa_scale.core.files import file_lock, row_of
from vjepa_scale.core.installed import command, module_environment
from vjepa_scale.core.worker_pool import kill_processes, process_tree
from vjepa_scale.monitor.sinks import Series, Sink, TensorBoard, Wandb, numbers
from vjepa_scale.monitor.status import launch_source, run_recipe
from vjepa_scale.recipe import Stage, stages_of
from vjepa_scale.recipe.log_sections import WandbConfig
from vjepa_scale.run.events import History
from vjepa_scale.run.lock import stage_lock
from vjepa_scale.training.preflight import check_sinks_installed

_log = logging.getLogger(__name__)

SINKS: dict[str, Callable[[Series], Sink]] = {"wandb": Wandb, "tensorboard": TensorBoard}
POLL_S = 1.0
WATCH_S = 2.0
HELD_S = 2.0  # how long a publisher that was started by hand waits for another one


class Publishers:
    """The publishers of a stage, one per sink, as child processes of this one.

    timeout_s: how long ``end`` waits; a publisher whose parent is killed ends after it, too. None: no limit
    live:      this process trains the stage
    """

    def __init__(self, stage: Stage, sinks: Sequence[str], *, timeout_s: float | None, live: bool) -> None:
        self._stage, self._timeout_s = stage.name, timeout_s
        self._again = f"{command('launch')} publish {stage.recipe.run.dir}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for sink in sinks:
            try:
                stage.folder.mkdir(parents=True, exist_ok=True)
                self._processes[sink] = _start(stage, sink, timeout_s, live)
            except OSError as error:
                _log.warning("%s: no process for %s can be started: %s", stage.name, sink, error)

    def end(self, exit_code: int | None) -> bool:
        """Send what is left; whether every sink has all rows.

        exit_code: of the attempt at the stage; None: it was killed
        """
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(OSError):  # it has ended
                process.stdin.write(b"" if exit_code is None else b"%d\n" % exit_code)
                process.stdin.flush()
            with suppress(OSError):
                process.stdin.close()
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        ended = [self._ended(sink, process, deadline) for sink, process in self._processes.items()]
        return all(ended)

    def _ended(self, sink: str, process: subprocess.Popen[bytes], deadline: float | None) -> bool:
        try:
            return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            kill_processes(process_tree(process.pid))
            process.wait()
            _log.warning(
                "%s: %s does not have all rows after %g s (log.sink_timeout_s); they are sent by the stage's next "
                "attempt, or by: %s --to %s",
                *(self._stage, sink, self._timeout_s, self._again, sink),
            )
            return False


def publish(run_folder: Path, sinks: Sequence[str] | None) -> int:
    """Send the metrics of a run's stages, in their order; of a stage that trains until its attempt is over.

    sinks: of ``SINKS``; None: those of its recipe
    Returns 0 where every sink has all rows, else 1. Raises UserError for a run or a sink that is not there.
    """
    recipe = run_recipe(run_folder)
    for sink in sinks or ():
        if sink not in SINKS:
            raise UserError(f"no sink {sink!r}", where="--to", fix=", ".join(SINKS))
    sinks = sinks or recipe.log.sinks
    if not sinks:
        raise UserError(
            "the recipe has neither log.wandb nor log.tensorboard", where=run_folder, fix="--to wandb,tensorboard"
        )
    check_sinks_installed(sinks)
    whole = True
    for stage in stages_of(recipe).values():
        if not (stage.folder / "metrics.jsonl").exists():
            continue
        print(f"{stage.name}: to {', '.join(sinks)}", flush=True)
        publishers = Publishers(stage, sinks, timeout_s=None, live=False)
        while _trains(stage.folder):
            time.sleep(WATCH_S)
        whole &= publishers.end(last_exit_code(stage.folder))
    return 0 if whole else 1


def _trains(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    with stage_lock(folder, patience_s=0) as free:
        return not free


def last_exit_code(folder: Path) -> int | None:
    """How the last attempt at a stage ended; None: it was killed, or it runs."""
    for row in reversed(History(folder).rows()):
        match row["event"]:
            case "done":
                return 0
            case "interrupted":
                return EXIT_SAVED
            case "failed":
                return EXIT_USER_ERROR if row["user_error"] else 1
            case "started":
                return None
    return None


# -- the process of a sink -------------------------------------------------------------------------


def _start(stage: Stage, sink: str, timeout_s: float | None, live: bool) -> subprocess.Popen[bytes]:
    recipe = stage.recipe
    order = {
        "sink": sink,
        "folder": str(stage.folder.absolute()),
        "kind": stage.kind,
        "recipe": recipe.model_dump(mode="json"),
        "wandb": (recipe.log.wandb or WandbConfig()).model_dump(mode="json"),
        "timeout_s": timeout_s,
        "live": live,
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        env=module_environment(),
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the trainer, which says when it is over
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended, and said why
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    return process


@dataclass
class _End:
    """over: the process that started us has ended the series, or has ended itself."""

    over: threading.Event
    exit_code: int | None = None

    def wait_for(self, pipe: BinaryIO, timeout_s: float | None) -> None:
        """In a thread: the pipe's end. ``timeout_s`` later this process ends, whatever it does."""
        with suppress(ValueError):
            self.exit_code = int(pipe.readline())
        self.over.set()
        if timeout_s is not None:
            time.sleep(timeout_s)
            kill_processes(process_tree(os.getpid())[1:])
            os._exit(1)


class _Rows:
    """The rows of a file that grows, and that is replaced by its own beginning where a stage resumes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None  # kept open: its inode is not given to another one meanwhile

    def new(self) -> Iterator[dict[str, Any]]:
        """The whole lines since the last call; from the first one on where the file is another one."""
        with suppress(FileNotFoundError):
            if self._file is None or not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                if self._file is not None:
                    self._file.close()
                self._file = open(self._path, "rb")  # noqa: SIM115
        while self._file is not None:
            position = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(position)
                return
            if (row := row_of(line)) is not None and isinstance(row.get("step"), int):
                yield row


def _send(series: Series, sink: Sink, end: _End) -> None:
    rows = _Rows(series.folder / "metrics.jsonl")
    while True:
        over = end.over.is_set()  # before the rows: what was written until then is read
        for row in rows.new():
            if row["step"] > sink.last:
                sink.write(row["step"], numbers(row))
                sink.last = row["step"]
        sink.flush()
        if over:
            sink.close(end.exit_code)
            return
        end.over.wait(POLL_S)


def _commit(run_folder: Path) -> str | None:
    """Of the code that was launched last, where git knew it."""
    launches = sorted(path.parent.name for path in run_folder.glob("launches/*/source.json"))
    return launch_source(run_folder, launches[-1]).get("commit") if launches else None


def _serve(pipe: BinaryIO) -> int:
    """Publish what the first line of the pipe says, until its end; the exit code."""
    if not (line := pipe.readline()):
        return 1  # the process that started us has ended
    order = json.loads(line)
    name, folder, live = order["sink"], Path(order["folder"]), order["live"]
    series = Series(folder, order["kind"], order["recipe"], _commit(folder.parent), order["wandb"], live)
    if live:
        log.set_up(f"{series.stage} {name}")
    end = _End(threading.Event())
    threading.Thread(target=end.wait_for, args=(pipe, order["timeout_s"]), daemon=True).start()
    if name == "wandb" and os.environ.get("WANDB_MODE") == "disabled":
        _log.info("W&B is disabled by WANDB_MODE: it gets no rows")
        return 0
    # An earlier attempt's publisher may still be at its end.
    patience = order["timeout_s"] + HELD_S if live else HELD_S
    try:
        with file_lock(folder / f".{name}.lock", patience_s=patience) as held:
            if not held:
                raise UserError("another process sends this stage", where=name, fix="wait for it, or end it")
            _send(series, SINKS[name](series), end)
        return 0
    except Exception as error:  # noqa: BLE001 (whatever a package of others raises: training goes on)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        again = f"{command('launch')} publish {folder.parent} --to {name}"
        rest = f"; training goes on, and the rest is sent by: {again}" if live else ""
        _log.warning("%s: %s gets no more rows: %s%s", series.stage, name, " ".join(what.split()), rest)
        return 1


if __name__ == "__main__":
    os.nice(5)
    # Slurm sends them to all processes of a step; the pipe says when the stage is over.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    log.set_up()
    code = _serve(sys.stdin.buffer)
    sys.stdout.flush()
    os._exit(code)  # what a package of others has left running must not hold the stage's end
