"""Where the rows of metrics.jsonl are sent to: Weights & Biases and TensorBoard.

A sink knows the last step that it has from what it wrote itself (TensorBoard's event files, W&B's files or server),
so that rows are neither sent twice nor left out, however the process before it ended. Both packages are optional:
they are imported where a sink is opened. Without PyTorch.
"""

import logging
import netrc
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from vjepa_scale.core.errors import EXIT_SAVED, UserError
from vjepa_scale.core.files import read_json, row_of, write_json

_log = logging.getLogger(__name__)

ANSWER_S = 5.0  # how long a W&B server may take to answer before ``mode: auto`` is offline


@dataclass(frozen=True)
class Series:
    """The metrics of one stage, and what is known of them.

    folder: RUN/STAGE; kind: of the stage
    recipe: the resolved recipe as JSON; commit: of the code, where git knows it
    wandb:  log.wandb as JSON
    live:   sent by the stage while it trains, not by hand
    """

    folder: Path
    kind: str
    recipe: dict[str, Any]
    commit: str | None
    wandb: dict[str, Any]
    live: bool

    @property
    def run(self) -> str:
        return self.folder.parent.name

    @property
    def stage(self) -> str:
        return self.folder.name


class Sink(Protocol):
    """last: the last step that it has; -1: none"""

    last: int

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, exit_code: int | None) -> None:
        """exit_code: of the stage's attempt; None: it was killed"""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, without its step; those of a section have its name before theirs: ``section/name``."""
    return {name: value for name, value in _numbers(row, "") if name != "step"}


def _numbers(row: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


# -- TensorBoard -----------------------------------------------------------------------------------


class TensorBoard:
    """An event file per attempt, below RUN/STAGE/tensorboard; one record per step, which is whole or ignored."""

    def __init__(self, series: Series) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = series.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        files = sorted(folder.glob("events.out.tfevents.*"))
        self.last = max((step for file in files for step in _steps_of(file)), default=-1)
        # TensorBoard reads files by name: a node whose clock is behind must not write before those of another.
        second = max([int(time.time()), *(int(file.name.split(".")[3]) + 1 for file in files)])
        path = folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
        self._writer = RecordWriter(self._file)
        self._add(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])
        self._add(self._event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        self._file.flush()

    def close(self, exit_code: int | None) -> None:
        self._file.close()


def _steps_of(file: Path) -> Iterator[int]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return (event.step for event in LegacyEventFileLoader(str(file)).Load() if event.HasField("summary"))


# -- Weights & Biases ------------------------------------------------------------------------------


class Wandb:
    """One W&B run per stage. Its id, in RUN/STAGE/wandb.json, stays the same over restarts.

    Online, the server knows the last step. Offline, each attempt has a folder below RUN/STAGE/wandb; ``wandb sync``
    joins those of one run.
    """

    def __init__(self, series: Series) -> None:
        state = _State(series.folder / "wandb.json")  # before the import, which takes a second
        import wandb

        cfg, environment = series.wandb, os.environ
        of_run = cfg["group"] or series.run
        mode: Any = environment.get("WANDB_MODE") or cfg["mode"]
        if mode == "auto":
            why = _why_offline(str(wandb.setup().settings.base_url), environment)
            mode = "offline" if why else "online"
            _log.info("W&B is %s%s", mode, f": {why}" if why else "")
        offline = mode in ("offline", "dryrun")
        if offline:
            environment.setdefault("WANDB_ERROR_REPORTING", "false")  # which is sent, too
        place = Path(environment.get("WANDB_DIR") or series.folder)
        self.last = state.last_step(place / "wandb") if offline else -1
        of_environment = {
            "project": ("WANDB_PROJECT", cfg["project"]),
            "entity": ("WANDB_ENTITY", cfg["entity"]),
            "group": ("WANDB_RUN_GROUP", of_run),
            "name": ("WANDB_NAME", f"{cfg['name'] or of_run}-{series.stage}"),
            "tags": ("WANDB_TAGS", cfg["tags"]),
            "job_type": ("WANDB_JOB_TYPE", series.kind),
            "dir": ("WANDB_DIR", str(series.folder)),
        }
        self._run = wandb.init(
            **{key: value for key, (variable, value) in of_environment.items() if not environment.get(variable)},
            id=state.run_id,
            resume=None if offline else "allow",
            mode=mode,
            config=series.recipe,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,  # the stage may run a copy, which is in no checkout
                git_commit=series.commit,
                x_disable_stats=not series.live,
            ),
        )
        if not offline:
            self.last = self._run.starting_step - 1
            _log.info("W&B: %s", self._run.url)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        """wandb's own process writes what it has been given."""

    def close(self, exit_code: int | None) -> None:
        if exit_code == EXIT_SAVED:
            self._run.mark_preempting()
        self._run.finish(exit_code=1 if exit_code is None else exit_code)


class _State:
    """RUN/STAGE/wandb.json: the run's id, and the last step in the files of each attempt that is over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Random: another run at the same path is another W&B run.
        found = read_json(path) if path.exists() else {"id": secrets.token_hex(4), "last_steps": {}}
        if not (isinstance(found, dict) and isinstance(found.get("id"), str)):
            raise UserError('not {"id": …}', where=path, fix="remove it: the stage becomes another W&B run")
        self.run_id: str = found["id"]
        self._last_steps: dict[str, int] = found.get("last_steps", {})
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"id": self.run_id, "last_steps": self._last_steps})

    def last_step(self, folder: Path) -> int:
        """The last step in the files of the run, by wandb's own reader; -1: there is none.

        Returns only where a new folder of the run gets another name: they are named by the second.
        """
        for file in sorted(folder.glob(f"*run-*-{self.run_id}/run-{self.run_id}.wandb")):
            attempt = file.parent.name
            if attempt not in self._last_steps:
                self._last_steps[attempt] = max(_steps_of_wandb(file), default=-1)
                self._write()
            time.sleep(max(0.0, min(1.0, file.parent.stat().st_ctime + 1.0 - time.time())))
        return max(self._last_steps.values(), default=-1)


def _why_offline(server: str, environment: Mapping[str, str]) -> str | None:
    """Why nothing can be sent to this W&B server; None: it answers, and there is a key for it."""
    if not (environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE") or _in_netrc(server)):
        return "there is no API key (WANDB_API_KEY, or wandb login)"
    try:
        with urllib.request.urlopen(server, timeout=ANSWER_S):
            return None
    except urllib.error.HTTPError:  # an answer
        return None
    except (OSError, ValueError) as error:
        return f"{server} does not answer: {getattr(error, 'reason', error)}"


def _in_netrc(server: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _steps_of_wandb(file: Path) -> Iterator[int]:
    words = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--json", str(file)]
    quiet = {**os.environ, "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": "offline"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=quiet) as reader:
        assert reader.stdout is not None
        for line in reader.stdout:
            if b'"type":"history"' in line and (row := row_of(line)) is not None:
                yield int(row["history"]["step"]["num"])
    if reader.returncode:
        raise RuntimeError(f"wandb leet inspect cannot read {file}: exit code {reader.returncode}")
