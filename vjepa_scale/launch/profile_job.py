"""What a job gets of a profile: parameters of submitit, arguments of srun, lines of its script, its command."""

import re
import shlex
import sys
from typing import Any

from vjepa_scale.launch.profile import Profile, guarded
from vjepa_scale.launch.profile_values import VARIABLE

_GPU_GRES = re.compile(r"(gres[:/])?gpu(:|$)")
_GPU_OPTION = re.compile(r"(^|[-:/=])gpus?($|[-:=])")  # gpus, gpu-bind, mem-per-gpu, tres-per-task=gres/gpu:1


def submitit_parameters(profile: Profile, *, needs_gpus: bool, tasks_per_node: int) -> dict[str, Any]:
    """Keyword arguments for ``SlurmExecutor.update_parameters``: everything that is the site's.

    needs_gpus:     the recipe's processes each drive a GPU
    tasks_per_node: processes per node
    The caller adds the job's own: job_name, nodes, ntasks_per_node, cpus_per_task, time, dependency. Where it has
    ``setup``, ``srun_args`` or ``additional_parameters`` too, it must join them with these.
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
    """What the site's profile hands to srun."""
    # Where sbatch was told --export=NONE (some sites do by default), srun would hand on nothing either.
    exports = [] if any(argument.startswith("--export=") for argument in profile.srun) else ["--export=ALL"]
    return [*exports, *profile.srun]


def _gpus_per_node(profile: Profile, needs_gpus: bool, tasks_per_node: int) -> int | None:
    if profile.gpus_per_node is not None:
        return profile.gpus_per_node or None
    named = [part.removeprefix("gres:").removeprefix("gres/") for part in (profile.gres or "").split(",")]
    asked = any(part.split(":")[0] == "gpu" for part in named) or "gpus" in profile.sbatch
    return tasks_per_node if needs_gpus and not asked else None


def without_gpus(profile: Profile) -> Profile:
    """The same site for jobs that use no GPU: none is asked for, in none of the ways there are."""
    parts = [part for part in (profile.gres or "").split(",") if part and not _GPU_GRES.match(part)]
    sbatch = {name: value for name, value in profile.sbatch.items() if not _GPU_OPTION.search(f"{name}={value}")}
    return profile.model_copy(update={"gpus_per_node": 0, "gres": ",".join(parts) or None, "sbatch": sbatch})


def setup_lines(profile: Profile) -> list[str]:
    """Lines of bash for the batch script before srun: modules, variables, the site's own lines.

    Any that fails says so on stderr and ends the job with status 1.
    """
    lines = [
        'setup_failed() { local said="status $? in the setup of this job: $1"; echo "error: $said" >&2; '
        # Another node may be whole: slurm.py's finish decides.
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
    """Container prefix and interpreter of the processes, quoted for bash: ``SlurmExecutor(python=…)``."""
    python = shlex.quote(sys.executable) if profile.python is None else _quoted(profile.python)
    return " ".join([*map(_quoted, shlex.split(profile.container or "")), python])


def _quoted(word: str) -> str:
    """A word for bash in which only ``$NAME`` and ``${NAME}`` are filled in, and never split."""
    if not VARIABLE.search(word):
        return shlex.quote(word)
    parts: list[str] = []
    end = 0
    for found in VARIABLE.finditer(word):
        parts += [re.sub(r'([\\"$`])', r"\\\1", word[end : found.start()]), found.group()]
        end = found.end()
    return '"' + "".join(parts) + re.sub(r'([\\"$`])', r"\\\1", word[end:]) + '"'
