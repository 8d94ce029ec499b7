"""What W&B's and TensorBoard's own readers find of a stage; a W&B server that never answers."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Read = tuple[list[int], list[float]]  # steps and values, in the reader's order


def tensorboard_series(stage_folder: Path, name: str) -> Read:
    """Of all event files together, as TensorBoard shows them."""
    found = EventAccumulator(str(stage_folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    events = found.Scalars(name)
    return [event.step for event in events], [event.value for event in events]


def wandb_records(stage_folder: Path) -> list[dict[str, Any]]:
    """The records of all attempts, oldest first, as ``wandb sync`` joins them."""
    lines: list[str] = []
    for file in sorted(stage_folder.glob("wandb/offline-run-*/*.wandb")):
        words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", file]
        done = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, "WANDB_ERROR_REPORTING": "false"}, check=True
        )
        lines += done.stdout.splitlines()
    return [json.loads(line) for line in lines]


def wandb_series(records: list[dict[str, Any]], name: str) -> Read:
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    rows = [row for row in rows if name in row]
    return [row["_step"] for row in rows], [row[name] for row in rows]


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    taken.append(server.accept()[0])
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
