"""Checks of the values of a profile. Each function returns the value, or raises ValueError with what is wrong."""

import re
import shlex
from typing import Any

# Options that the launcher sets, and why. A second value in the batch script would override the launcher's.
LAUNCHERS = {
    "job-name": "it is the run folder's name and the stage",
    "nodes": "it is launch.nodes of the recipe",
    "ntasks": "it follows from launch.nodes and launch.tasks_per_node of the recipe",
    "ntasks-per-node": "it is launch.tasks_per_node of the recipe",
    "cpus-per-task": "it is launch.cpus_per_task of the recipe",
    "time": "it is launch.timeout_min of the recipe",
    "dependency": "a stage waits for the one before",
    "kill-on-invalid-dep": "a stage behind a failed one is cancelled",
    "output": "logs are in the stage's folder",
    "error": "logs are in the stage's folder",
    "open-mode": "logs are appended to over restarts",
    "signal": "it is signal_delay_s of this profile",
    "requeue": "it is requeue of this profile",
    "no-requeue": "it is requeue of this profile",
    "array": "a stage is one job",
    "chdir": "paths of the recipe are relative to the folder of the launch",
    "no-kill": "a job that lost a node has to start again from its checkpoint",
    "gpus-per-task": "every process must have access to all GPUs of its node; use gpus_per_node or gres",
    "parsable": "the launcher reads what sbatch prints",
    "quiet": "the launcher reads what sbatch prints",
    "test-only": "nothing would be submitted; use --dry-run --print-sbatch",
    "wait": "sbatch would not return; use --wait of the launcher",
    "wrap": "the launcher writes the script",
    "clusters": "jobs are looked up in the cluster that the launch is made on",
    "cluster": "jobs are looked up in the cluster that the launch is made on",
}
_SRUN_LAUNCHERS = re.compile(
    r"--(output|error|input|nodes|ntasks|ntasks-per-node|gpus-per-task|jobid|multi-prog|no-kill|pty|test-only)|-[oeiNnk].*"
)
# Variables that differ from process to process: a fixed value would be the same for all.
_RANK_VARIABLES = re.compile(
    r"(LOCAL_)?(RANK|WORLD_SIZE)|SUBMITIT_EXECUTOR|SLURM_(PROCID|NTASKS|LOCALID|JOB_ID|STEP_ID)"
)
VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", re.ASCII)


def line(value: str) -> str:
    """Checks for one line that is not empty: a line break would end an #SBATCH line and begin a command."""
    if not value.strip():
        raise ValueError("is empty; take the line out")
    if any(not character.isprintable() for character in value):
        raise ValueError(f"{value!r} holds a line break or a control character")
    return value


def text(value: str) -> str:
    """Checks text for Slurm, which expands neither variables nor ~, and drops backslashes from #SBATCH lines."""
    line(value)
    if "\\" in value:
        raise ValueError(f"{value!r}: Slurm drops backslashes")
    if VARIABLE.search(value) or re.search(r"(^|=)~", value):
        raise ValueError(f"{value!r}: Slurm expands neither variables nor ~; write it out")
    return value


def word(value: str) -> str:
    if any(character.isspace() for character in text(value)):
        raise ValueError(f"{value!r} holds a space")
    return value


def mem(value: str) -> str:
    if not re.fullmatch(r"0|\d+[KMGTkmgt][Bb]?", value):
        raise ValueError(f"{value!r} is not an amount with its unit; write for example 480G, or 0 for all of a node")
    return value


def option(name: str) -> str:
    """Returns the long name of an sbatch option, as sbatch spells it."""
    option = name.replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", option) or len(option) < 2:
        raise ValueError(f"{name!r} is not an option's long name without dashes in front, such as licenses")
    if option in LAUNCHERS:
        raise ValueError(f"{option} is the launcher's: {LAUNCHERS[option]}")
    return option


def option_value(value: Any) -> Any:
    if value is None:
        raise ValueError("no value; write true for an option that takes none")
    if value == "false" or value is False:
        raise ValueError("an option cannot be false; take the line out")
    return "true" if value is True else value


def variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is not a variable's name")
    if _RANK_VARIABLES.fullmatch(name):
        raise ValueError(f"{name} differs from process to process, and srun or submitit sets it")
    return name


def variable_value(value: str) -> str:
    if "\0" in value:
        raise ValueError("a variable cannot hold a zero byte")
    return value


def module(value: str) -> str:
    if any(character.isspace() for character in line(value)):
        raise ValueError(f"{value!r} holds a space: one module an item")
    return value


def setup(value: str) -> str:
    if re.match(r"\s*#(SBATCH|PBS|BSUB)\b", value):
        raise ValueError(f"{value!r} is an option of sbatch: write it under sbatch")
    return variable_value(value)


def command(value: str) -> str:
    """Checks words of a command, quoted as in a shell, with no shell syntax other than $NAME."""
    try:
        words = shlex.split(line(value))
    except ValueError as error:
        raise ValueError(f"{value!r}: {str(error).lower()}") from None
    for word in words:
        shell_text(word)
        if word in (";", "&", "&&", "|", "||", ">", "<"):
            raise ValueError(f"{value!r}: {word!r} would be an argument; commands before python belong in setup")
    return value


def shell_text(value: str) -> str:
    rest = VARIABLE.sub("", line(value))
    if "$" in rest or "`" in rest:
        raise ValueError(f"{value!r}: only $NAME and ${{NAME}} are expanded")
    if value.startswith("~"):
        raise ValueError(f"{value!r}: ~ is not expanded; write $HOME")
    return value


def srun(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Checks for options only: srun runs the first argument that is not an option as the command."""
    takes_value = False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not argument.startswith("-"):
            if not takes_value:
                raise ValueError(f"{argument!r} is not an option: srun would run it instead of Python")
            takes_value = False
            continue
        if any(character.isspace() for character in name):
            raise ValueError(f"{argument!r} is one argument to srun; write --option=value")
        if _SRUN_LAUNCHERS.fullmatch(name):
            raise ValueError(f"{name} is the launcher's")
        takes_value = "=" not in argument
    return arguments


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def as_exclusive(value: Any) -> Any:
    return {"true": True, "yes": True, "false": False, "no": False}.get(value, value) if str(value) == value else value
