"""Evaluates checkpoints while a stage trains, in a process beside rank 0 that follows the checkpoint folder.

    rank 0 ── checkpoints/ ──► this process ──► evaluations.jsonl          on this machine, or evaluate.where: job
       └─ a pipe: exit code ─►     └──────────► sbatch evaluate-STAGE.sbatch     on Slurm, with evaluate.where: own

The trainer does not know it: an evaluation that is slow or fails delays no step. The pipe ends with the process that
started this one, however that ends. What is not evaluated then is found by the stage's next attempt.
"""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from vjepa_scale.checkpoint.evaluations import not_evaluated
from vjepa_scale.checkpoint.manifest import newest_first
from vjepa_scale.core import log
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import command, module_environment
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.core.worker_pool import kill_processes, process_tree
from vjepa_scale.launch.evaluation_job import submit_evaluation
from vjepa_scale.monitor.evaluate import StageEvaluator
from vjepa_scale.recipe import Recipe, Stage, stages_of
from vjepa_scale.recipe.evaluate_section import EvaluateConfig, evaluation_of
from vjepa_scale.training.signals import Interrupt

_log = logging.getLogger("vjepa_scale.launch.evaluator")  # not __name__: it runs as __main__

POLL_S = 2.0
_WAIT_S = 0.1
NICE = 10


class Evaluator:
    """The evaluating process of a stage, as a child of rank 0."""

    def __init__(self, stage: Stage, ranks: Ranks, interrupt: Interrupt) -> None:
        self._stage, self._config, self._interrupt = stage, evaluation_of(stage), interrupt
        self._process: subprocess.Popen[bytes] | None = None
        if self._config is None or self._config.where == "off":
            return
        order = {
            "recipe": stage.recipe.model_dump(mode="json"),
            "folder": str(Path(stage.recipe.run.dir).absolute()),
            "stage": stage.name,
            "submits": ranks.source == "slurm" and self._config.where == "own",
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                env=module_environment(),
                stdin=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the launcher
            )
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            _log.warning("%s: no process for its evaluations can be started: %s", stage.name, error)

    def end(self, exit_code: int) -> None:
        """After a stage that is done, waits for its last evaluations, at most ``evaluate.finish_s``; else ends them.

        A signal to this process ends the waiting.
        """
        if self._process is None or self._config is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended
            self._process.stdin.write(b"%d\n" % exit_code)
            self._process.stdin.close()
        deadline = time.monotonic() + (self._config.finish_s if exit_code == 0 else 0)
        while self._process.poll() is None and time.monotonic() < deadline and self._interrupt.signal is None:
            time.sleep(_WAIT_S)
        if self._process.poll() is None:
            kill_processes(process_tree(self._process.pid))
            self._process.wait()
            if exit_code == 0:
                _log.warning(
                    "%s: not every checkpoint is evaluated after %s; the rest: %s %s --stage %s",
                    *(self._stage.name, self._interrupt.signal or f"{self._config.finish_s:g} s (evaluate.finish_s)"),
                    command("evaluate"),
                    *(self._stage.recipe.run.dir, self._stage.name),
                )


# -- the process -----------------------------------------------------------------------------------


def _follow(stage: Stage, config: EvaluateConfig, over: threading.Event, *, submits: bool) -> None:
    """Evaluates, or has Slurm evaluate, what is due, until the stage is over."""
    evaluator = StageEvaluator(stage, config, device="cpu" if config.device == "auto" else config.device)
    seen: list[str] = []
    refused = False
    submitted, said = set[str](), set[str]()
    while True:
        last = over.is_set()  # before the folder is read: what was saved until then is evaluated
        names = [path.name for path in newest_first(stage.checkpoints)]
        if names != seen or (last and refused):  # only then are manifests read
            seen = names
            if submits:
                due = {path.name for path in not_evaluated(stage, config, only_due=True)}
                refused = bool(due - submitted) and not _is_submitted(stage, said)
                submitted |= set() if refused else due
            else:
                evaluator.evaluate_due(patience_s=math.inf)  # a user's command may be evaluating all checkpoints
        if last:
            return
        over.wait(POLL_S)


def _is_submitted(stage: Stage, said: set[str]) -> bool:
    """Has Slurm evaluate what is due. Returns False, with a warning for each cause, where it does not accept the job:
    the next checkpoint's job will do this one's work."""
    try:
        submit_evaluation(stage)
    except UserError as error:
        if error.what not in said:
            _log.warning(f"{stage.name}: {error}; training goes on")
        said.add(error.what)
        return False
    return True


def _wait_for_the_end(pipe: BinaryIO, over: threading.Event) -> None:
    """In a thread. Only a stage that is done waits for evaluations; otherwise this process ends at once."""
    if pipe.readline() != b"0\n":
        kill_processes(process_tree(os.getpid())[1:])
        os._exit(1)
    over.set()


def _serve(pipe: BinaryIO) -> int:
    if not (line := pipe.readline()):
        return 1  # the process that started us has ended
    order: dict[str, Any] = json.loads(line)
    recipe = Recipe.model_validate(order["recipe"])
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": order["folder"]})})
    stage = stages_of(recipe)[order["stage"]]
    config = evaluation_of(stage)
    assert config is not None
    log.set_up(f"{stage.name} evaluation")
    over = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(pipe, over), daemon=True).start()
    try:
        if not order["submits"]:
            import torch

            torch.set_num_threads(recipe.engine.threads)
        _follow(stage, config, over, submits=order["submits"])
        return 0
    except Exception as error:  # noqa: BLE001 (training goes on, whatever ends its evaluations)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        again = f"{command('evaluate')} {order['folder']} --stage {stage.name}"
        _log.warning(f"{stage.name}: no more evaluations: {' '.join(what.split())}; training goes on; later: {again}")
        return 1


if __name__ == "__main__":
    os.nice(NICE)
    # Slurm sends them to all processes of a step; the pipe says when the stage is over.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    log.set_up()
    began = time.monotonic()
    code = _serve(sys.stdin.buffer)
    _log.debug("evaluations: %.1f s", time.monotonic() - began)
    sys.stdout.flush()
    kill_processes(process_tree(os.getpid())[1:])
    os._exit(code)  # loader workers must not hold the stage's end
