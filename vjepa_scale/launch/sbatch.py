"""Submits any job of ours: options from the site's profile, submitit's executor, sbatch's error messages.

submitit writes the batch script: the site's setup, ``srun`` of our Python processes, then our epilogue, which queues
the job again if a process has ended with status 75.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import submitit

from vjepa_scale.core import log
from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.profile import Profile, guarded
from vjepa_scale.launch.profile_values import VARIABLE
from vjepa_scale.launch.snapshot import import_lines
from vjepa_scale.monitor.jobs import SlurmUnavailable, run_slurm
from vjepa_scale.training.signals import SIGNAL_DELAY

# -- from a profile: parameters of submitit, arguments of srun, lines of the script -----------------

_GPU_GRES = re.compile(r"(gres[:/])?gpu(:|$)")
_GPU_OPTION = re.compile(r"(^|[-:/=])gpus?($|[-:=])")  # gpus, gpu-bind, mem-per-gpu, tres-per-task=gres/gpu:1


def submitit_parameters(profile: Profile, *, needs_gpus: bool, tasks_per_node: int) -> dict[str, Any]:
    """Returns the site's keyword arguments for ``SlurmExecutor.update_parameters``.

    needs_gpus:     each process of the recipe uses a GPU
    tasks_per_node: processes per node
    The caller adds the job's own: job_name, nodes, ntasks_per_node, cpus_per_task, time, dependency. If it also has
    ``setup``, ``srun_args`` or ``additional_parameters``, it must join them with these.
    """
    sbatch: dict[str, Any] = {name: value == "true" or value for name, value in profile.sbatch.items()}
    parameters: dict[str, Any] = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "gres": profile.gres,
        "gpus_per_node": _gpus_per_node(profile, needs_gpus, tasks_per_node),
        "constraint": profile.constraint,
        "nodelist": ",".join(profile.nodelist) or None,
        "exclude": ",".join(profile.exclude) or None,
        "exclusive": profile.exclusive or None,
        "mem": profile.mem,
    }
    additional: dict[str, Any] = {"requeue" if profile.requeue else "no-requeue": True}
    if profile.reservation is not None:
        additional["reservation"] = profile.reservation
    return {name: value for name, value in parameters.items() if value is not None} | {
        "signal_delay_s": profile.signal_delay_s,
        "wckey": sbatch.pop("wckey", None),  # submitit's own default is a key that sites with wckeys refuse
        "setup": setup_lines(profile),
        "srun_args": srun_arguments(profile),
        "additional_parameters": {**additional, **sbatch},
    }


def srun_arguments(profile: Profile) -> list[str]:
    """Returns the site profile's arguments of srun."""
    # After sbatch --export=NONE (the default of some sites), srun would not pass the environment on either.
    exports = [] if any(argument.startswith("--export=") for argument in profile.srun) else ["--export=ALL"]
    return [*exports, *profile.srun]


def _gpus_per_node(profile: Profile, needs_gpus: bool, tasks_per_node: int) -> int | None:
    if profile.gpus_per_node is not None:
        return profile.gpus_per_node or None
    named = [part.removeprefix("gres:").removeprefix("gres/") for part in (profile.gres or "").split(",")]
    asked = any(part.split(":")[0] == "gpu" for part in named) or "gpus" in profile.sbatch
    return tasks_per_node if needs_gpus and not asked else None


def requested_gpus(profile: Profile) -> tuple[str, int] | None:
    """Returns the profile's key that requests GPUs, and their number per node; None if the profile does not say."""
    if profile.gpus_per_node is not None:
        return ("gpus_per_node", profile.gpus_per_node) if profile.gpus_per_node else None
    counts = []
    for part in (profile.gres or "").split(","):
        name, *rest = re.sub(r"^gres[:/]|\(.*", "", part).split(":")
        if name == "gpu":
            counts.append(int(rest[-1]) if rest and rest[-1].isdigit() else 1)  # Slurm's default count is 1
    return ("gres", sum(counts)) if counts else None


def without_gpus(profile: Profile) -> Profile:
    """Returns the profile without any option that requests GPUs, for jobs on the CPU."""
    parts = [part for part in (profile.gres or "").split(",") if part and not _GPU_GRES.match(part)]
    sbatch = {name: value for name, value in profile.sbatch.items() if not _GPU_OPTION.search(f"{name}={value}")}
    return profile.model_copy(update={"gpus_per_node": 0, "gres": ",".join(parts) or None, "sbatch": sbatch})


def setup_lines(profile: Profile) -> list[str]:
    """Returns lines of bash for the batch script before srun: modules, variables, the site's own lines.

    If one fails, it prints an error to stderr and ends the job with status 1.
    """
    lines = [
        'setup_failed() { local said="status $? in the setup of this job: $1"; echo "error: $said" >&2; '
        # Another node may work: ``finish`` of slurm.py decides.
        'if declare -F finish >/dev/null; then finish 1 "$said"; fi; exit 1; }',
        # From Slurm 22.05 on, srun takes a job's --cpus-per-task from this variable only.
        'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
    ]
    if profile.modules:  # a batch script has `module` only if the shell it was submitted from exported it
        lines.append("type module >/dev/null 2>&1 || . /etc/profile")
    for name in profile.modules:
        command = f"module load {shlex.quote(name)}"
        lines.append(f"{command} || setup_failed {shlex.quote(command)}")
    for name, value in profile.environment.items():
        lines.append(f"export {name}={shlex.quote(value)} || setup_failed {shlex.quote(f'export {name}')}")
    for item in profile.setup:
        lines.extend(guarded(item))
    return lines


def python_command(profile: Profile) -> str:
    """Returns container prefix and interpreter of the processes, quoted for bash: ``SlurmExecutor(python=…)``."""
    python = shlex.quote(sys.executable) if profile.python is None else _quoted(profile.python)
    return " ".join([*map(_quoted, shlex.split(profile.container or "")), python])


def _quoted(word: str) -> str:
    """Returns a word quoted for bash, in which only ``$NAME`` and ``${NAME}`` are expanded, without word splitting."""
    if not VARIABLE.search(word):
        return shlex.quote(word)
    parts: list[str] = []
    end = 0
    for found in VARIABLE.finditer(word):
        parts += [re.sub(r'([\\"$`])', r"\\\1", word[end : found.start()]), found.group()]
        end = found.end()
    return '"' + "".join(parts) + re.sub(r'([\\"$`])', r"\\\1", word[end:]) + '"'


# -- how a job is submitted --------------------------------------------------------------------------

SIGNAL = "USR2"
SIGNAL_EARLY_S = 60  # by Slurm's documentation, the signal may come up to a minute before the time of --signal


class ScriptExecutor(submitit.SlurmExecutor):
    """submitit's executor that can also return the script that it would submit.

    command: arguments of Python that the script runs instead of a pickled function; only for ``script``
    """

    command: str | None = None

    @property
    def _submitit_command_str(self) -> str:
        own: str = super()._submitit_command_str
        return own if self.command is None else f"{self.python} {self.command}"

    @classmethod
    def affinity(cls) -> int:
        return 2  # submitit's own method needs srun, which a dry run does not need

    def script(self, tasks: int = 1) -> str:
        """Returns the batch script that ``submit``, or ``map_array`` over this many tasks, passes to sbatch."""
        count = {"map_count": tasks} if tasks > 1 else {}  # as submitit's map_array: an array of one is a job
        asked = copy(self)
        asked.parameters = {**self.parameters, **count}
        return asked._make_submission_file_text(self._submitit_command_str, uid="")


def job_executor(
    profile: Profile,
    *,
    logs: Path,
    code: Path,
    finish: Sequence[str],
    name: str,
    nodes: int,
    tasks_per_node: int,
    cpus_per_task: int,
    timeout_min: int,
    needs_gpus: bool,
    after: str | None,
    srun_args: Sequence[str] = (),
) -> ScriptExecutor:
    """Returns the executor of one job, or of one array.

    code:      the folder from which its processes import vjepa_scale
    finish:    the commands of the batch script's function ``finish``. $1: srun's status; $2: the message of a failed
               line of the site's setup
    after:     the job that must succeed before it
    srun_args: come before the site's
    """
    refuse_pattern(logs)
    site = submitit_parameters(profile, needs_gpus=needs_gpus, tasks_per_node=tasks_per_node)
    additional = dict(site.pop("additional_parameters"))
    if after is not None:
        additional["kill-on-invalid-dep"] = "yes"
    site_srun_args = site.pop("srun_args")
    additional["signal"] = f"{SIGNAL}@{profile.signal_delay_s}"  # submitit's follows a variable of the user's shell
    imports = import_lines(code)
    before_site = ["finish() {", *(f"  {line}" for line in [*imports, *finish, "exit"]), "}", f"trap : TERM {SIGNAL}"]
    delay = f"export {SIGNAL_DELAY}={profile.signal_delay_s}"
    after_site = [*imports, f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}", delay, *_log_level()]
    executor = ScriptExecutor(folder=logs, python=python_command(profile))
    executor.update_parameters(
        **site | {"setup": [*before_site, *site["setup"], *after_site]},
        job_name=name,
        nodes=nodes,
        ntasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        time=timeout_min,
        dependency=f"afterok:{after}" if after else None,
        srun_args=[*srun_args, *site_srun_args],
        teardown=["finish $?"],
        additional_parameters=additional,
    )
    return executor


def _log_level() -> list[str]:
    """Returns lines that set the submitter's log level for the job. With --export=NONE sbatch does not pass it on."""
    word = os.environ.get(log.VARIABLE)
    return [f"export {log.VARIABLE}={shlex.quote(word)}"] if word else []


def epilogue(code: Path, *decide: str) -> str:
    """Returns a line of bash that runs epilogue.sh with $1 of ``finish`` and the command that decides about a failure.

    decide: the command's words, already quoted for bash
    """
    return " ".join(["bash", shlex.quote(str(code / "vjepa_scale" / "launch" / "epilogue.sh")), '"$1"', *decide])


def refuse_short(timeout_min: int, profile: Profile, *, named: str, doing: str, where: str) -> None:
    """Raises UserError if Slurm's signal before the time limit would come before a job has done anything."""
    if 60 * timeout_min <= profile.signal_delay_s + SIGNAL_EARLY_S:
        raise UserError(
            f"jobs of {timeout_min} minutes ({60 * timeout_min} s) that get Slurm's signal to save up to "
            f"{profile.signal_delay_s} + {SIGNAL_EARLY_S} s before their end would not {doing}",
            where=where,
            fix=f"a longer one, or a shorter signal_delay_s in profile {named}",
        )


# The fix if Slurm refuses a job, or if no cluster answers.
SEE_SLURM = "sinfo, sacctmgr show associations and scontrol show partition list what is allowed"
TRAIN_HERE = "--cluster local trains on this machine"
_NO_CLUSTER = re.compile(r"contact slurm|connect|slurm\.conf|configuration source|fetch_config|unknown host", re.I)


def fix_of(said: str) -> str:
    """Returns what the user can do about sbatch's error message: it refuses the job, or no cluster answers."""
    return TRAIN_HERE if _NO_CLUSTER.search(said) else SEE_SLURM


def need_sbatch(*, where: str, otherwise: str) -> None:
    """Raises UserError if there is no sbatch command. otherwise: what works without it"""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch command here", where=where, fix=f"run on a login node, or {otherwise}")


def refuse_pattern(folder: Path) -> None:
    """Raises UserError if Slurm would write logs of this folder elsewhere."""
    if "%" in str(folder):
        raise UserError("Slurm reads % in the path of a log as a pattern", where=folder, fix="a folder without %")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Defers Ctrl-C, a closed terminal's signal and SIGTERM until the block is done."""
    waiting = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def jobs_of(
    folder: Path, *, name: str | None = None, states: str | None = None, also: Collection[str] = ()
) -> list[str]:
    """Returns ids of this user's jobs, pending or running, whose script is below a folder, oldest first.

    name: only jobs with this name; states: only in these of Slurm's states
    also: these ids too, if they are in the queue, since the folder may have had another path
    An array has one id. Raises SlurmUnavailable.
    """
    named = ["--name", name] if name is not None else []
    named += ["--states", states] if states is not None else []
    asked = run_slurm(["squeue", "--me", "--noheader", *named, "--format", "%F %o"])
    if asked.returncode:
        raise SlurmUnavailable(" ".join(asked.stderr.split()) or f"squeue ended with {asked.returncode}")
    rows = (line.strip().partition(" ") for line in asked.stdout.splitlines())
    return sorted(
        {job_id for job_id, _, command in rows if command.startswith(f"{folder}/") or job_id in also}, key=int
    )


def objection(script: str) -> str:
    """Returns why Slurm would refuse a batch script now (``sbatch --test-only``); empty if it would not."""
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    return said_by_sbatch(done.stderr) if done.returncode else ""


def said_by_sbatch(text: str) -> str:
    """Returns sbatch's error messages, each once, without the prefix ``sbatch: error:``."""
    lines = [line.partition("error: ")[2].strip() for line in text.splitlines() if "sbatch: error: " in line]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or " ".join(text.split())
