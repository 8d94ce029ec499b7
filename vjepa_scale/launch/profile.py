"""What a site's Slurm wants, apart from the recipe: partition, account, modules, environment, container.

A profile is a YAML file, by name (slurm/profiles/NAME.yaml of this checkout) or by path. Every plain value is read as
the text that stands there, so ``NCCL_X: yes`` or ``mem: 0`` mean what Slurm and the shell would make of them.

python -m vjepa_scale.launch.profile > docs/slurm_profiles.md
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

import vjepa_scale
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.load import explain_invalid
from vjepa_scale.recipe.sections import Section

# -- what values may hold --------------------------------------------------------------------------

# What the launcher decides. A second value in the batch script would win over it, or break what relies on it.
_LAUNCHERS = {
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
    "gpus-per-task": "every process must see all GPUs of its node; use gpus_per_node or gres",
    "parsable": "the launcher reads what sbatch prints",
    "quiet": "the launcher reads what sbatch prints",
    "test-only": "nothing would be submitted; use --dry-run --print-sbatch",
    "wait": "sbatch would not come back; use --wait of the launcher",
    "wrap": "the launcher writes the script",
    "clusters": "jobs are looked up in the cluster that the launch is made on",
    "cluster": "jobs are looked up in the cluster that the launch is made on",
}
_SRUN_LAUNCHERS = re.compile(
    r"--(output|error|input|nodes|ntasks|ntasks-per-node|gpus-per-task|jobid|multi-prog|no-kill|pty|test-only)|-[oeiNnk].*"
)
# One process's place in the job: a fixed value would be the same for all of them.
_RANK_VARIABLES = re.compile(
    r"(LOCAL_)?(RANK|WORLD_SIZE)|SUBMITIT_EXECUTOR|SLURM_(PROCID|NTASKS|LOCALID|JOB_ID|STEP_ID)"
)
_GPU_GRES = re.compile(r"(gres[:/])?gpu(:|$)")
_GPU_OPTION = re.compile(r"(^|[-:/=])gpus?($|[-:=])")  # gpus, gpu-bind, mem-per-gpu, tres-per-task=gres/gpu:1
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", re.ASCII)


def _line(value: str) -> str:
    """One line that is not empty: a line break would end an #SBATCH line and begin a command."""
    if not value.strip():
        raise ValueError("is empty; take the line out")
    if any(not character.isprintable() for character in value):
        raise ValueError(f"{value!r} holds a line break or a control character")
    return value


def _text(value: str) -> str:
    """Text for Slurm itself, which fills in no variables, knows no ~, and drops backslashes from #SBATCH lines."""
    _line(value)
    if "\\" in value:
        raise ValueError(f"{value!r}: Slurm drops backslashes")
    if _VARIABLE.search(value) or re.search(r"(^|=)~", value):
        raise ValueError(f"{value!r}: Slurm fills in neither variables nor ~; write it out")
    return value


def _word(value: str) -> str:
    if any(character.isspace() for character in _text(value)):
        raise ValueError(f"{value!r} holds a space")
    return value


def _mem(value: str) -> str:
    if not re.fullmatch(r"0|\d+[KMGTkmgt][Bb]?", value):
        raise ValueError(f"{value!r} is not an amount with its unit; write for example 480G, or 0 for all of a node")
    return value


def _option(name: str) -> str:
    """The long name of an sbatch option, as sbatch spells it."""
    option = name.replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", option) or len(option) < 2:
        raise ValueError(f"{name!r} is not an option's long name without dashes in front, such as licenses")
    if option in _LAUNCHERS:
        raise ValueError(f"{option} is the launcher's: {_LAUNCHERS[option]}")
    if option.replace("-", "_") in Profile.model_fields:
        raise ValueError(f"{option} is a key of the profile itself: write it at the left margin")
    return option


def _option_value(value: Any) -> Any:
    if value is None:
        raise ValueError("no value; write true for an option that takes none")
    if value == "false" or value is False:
        raise ValueError("an option cannot be false; take the line out")
    return "true" if value is True else value


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is not a variable's name")
    if _RANK_VARIABLES.fullmatch(name):
        raise ValueError(f"{name} differs from process to process, and srun or submitit sets it")
    return name


def _variable_value(value: str) -> str:
    if "\0" in value:
        raise ValueError("a variable cannot hold a zero byte")
    return value


def _module(value: str) -> str:
    if any(character.isspace() for character in _line(value)):
        raise ValueError(f"{value!r} holds a space: one module an item")
    return value


def _setup(value: str) -> str:
    if re.match(r"\s*#(SBATCH|PBS|BSUB)\b", value):
        raise ValueError(f"{value!r} is an option of sbatch: write it under sbatch")
    return _variable_value(value)


def _command(value: str) -> str:
    """Words of a command, quoted as in a shell; nothing of a shell in it but $NAME."""
    try:
        words = shlex.split(_line(value))
    except ValueError as error:
        raise ValueError(f"{value!r}: {str(error).lower()}") from None
    for word in words:
        _shell_text(word)
        if word in (";", "&", "&&", "|", "||", ">", "<"):
            raise ValueError(f"{value!r}: {word!r} would be an argument; commands before python belong in setup")
    return value


def _shell_text(value: str) -> str:
    rest = _VARIABLE.sub("", _line(value))
    if "$" in rest or "`" in rest:
        raise ValueError(f"{value!r}: only $NAME and ${{NAME}} are filled in")
    if value.startswith("~"):
        raise ValueError(f"{value!r}: ~ is not filled in; write $HOME")
    return value


def _srun(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Options only: srun takes the first thing that is not one for the command to run."""
    takes_value = False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not argument.startswith("-"):
            if not takes_value:
                raise ValueError(f"{argument!r} is not an option: srun would run it in place of Python")
            takes_value = False
            continue
        if any(character.isspace() for character in name):
            raise ValueError(f"{argument!r} is one argument to srun; write --option=value")
        if _SRUN_LAUNCHERS.fullmatch(name):
            raise ValueError(f"{name} is the launcher's")
        takes_value = "=" not in argument
    return arguments


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_exclusive(value: Any) -> Any:
    return {"true": True, "yes": True, "false": False, "no": False}.get(value, value) if str(value) == value else value


Text = Annotated[str, AfterValidator(_text)]
Word = Annotated[str, AfterValidator(_word)]
Words = Annotated[tuple[Word, ...], BeforeValidator(_as_list)]


class Profile(Section):
    """One site, or one way to use it."""

    partition: Word | None = Field(None, description="partitions, separated by commas; default: the site's")
    account: Word | None = Field(None, description="whom the hours are charged to")
    qos: Word | None = Field(None, description="quality of service")
    reservation: Word | None = Field(None, description="reserved nodes to run on")
    gres: Word | None = Field(None, description="generic resources per node, for example `gpu:h100:8`")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="GPUs to ask for on each node; default: one per process, where the recipe needs GPUs and `gres` "
        "names none; 0: ask for none, where nodes are given whole",
    )
    constraint: Word | None = Field(None, description="features that nodes must have, for example `h100&ib`")
    nodelist: Words = Field((), description="nodes that must be among those used, for example `[gpu01]`")
    exclude: Words = Field((), description="nodes not to use, for example `['gpu[03-05]', gpu17]`")
    exclusive: Annotated[Literal[True, False, "user", "mcs", "topo"], BeforeValidator(_as_exclusive)] = Field(
        False, description="true: no other job on these nodes"
    )
    mem: Annotated[str, AfterValidator(_mem)] | None = Field(
        None, description="memory per node with its unit, for example `480G`; 0: all of it; default: the site's"
    )
    signal_delay_s: Annotated[int, Field(ge=1, le=65535)] = Field(
        300,
        description="seconds before the time limit at which the job is told to save and make room; Slurm may be up "
        "to 60 s early; longer than a step and a checkpoint take",
    )
    requeue: bool = Field(
        True,
        description="the job may be started again: by Slurm when a node fails or a job above preempts it, by the "
        "launcher after a time limit; false: neither",
    )
    modules: tuple[Annotated[str, AfterValidator(_module)], ...] = Field(
        (), description="`module load` each of these first, in this order"
    )
    environment: dict[
        Annotated[str, AfterValidator(_variable_name)], Annotated[str, AfterValidator(_variable_value)]
    ] = Field({}, description="variables of the job, exactly as written: nothing in a value is filled in")
    setup: tuple[Annotated[str, AfterValidator(_setup)], ...] = Field(
        (),
        description="lines of bash after that, on the first node, one command an item; where the status of one is "
        "not 0 the job fails",
    )
    container: Annotated[str, AfterValidator(_command)] | None = Field(
        None,
        description="command put before Python in every process, for example `apptainer exec --nv IMAGE.sif`; `$NAME` "
        "is filled in on the first node; `python` is then needed",
    )
    python: Annotated[str, AfterValidator(_shell_text)] | None = Field(
        None,
        description="the interpreter of the processes, in the container if there is one; default: the launching one",
    )
    srun: Annotated[tuple[Text, ...], AfterValidator(_srun)] = Field(
        (), description="more arguments of srun, for example `[--container-image=/images/vjepa.sqsh]`"
    )
    sbatch: dict[
        Annotated[str, AfterValidator(_option)],
        Annotated[str, AfterValidator(_text), BeforeValidator(_option_value)],
    ] = Field(
        {},
        description="any other option of sbatch by its long name, for example `{licenses: lustre, mail-type: FAIL}`; "
        "true for one without a value",
    )


# -- loading ---------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Plain values stay text; only an empty one is none. A key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_profile(name_or_path: str | None) -> Profile:
    """Read a site profile.

    name_or_path: NAME for slurm/profiles/NAME.yaml of this checkout, otherwise a path; None: Slurm's own defaults.
    Raises UserError naming ``file:key`` and what would work.
    """
    if name_or_path is None:
        return Profile()
    path = _path_of(name_or_path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError("no such profile", where=path, fix=_profiles_there()) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())}", where=path) from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError("a profile is a mapping of keys", where=path, fix="for example partition: gpu")
    try:
        profile = Profile.model_validate({key: value for key, value in (tree or {}).items() if value is not None})
    except ValidationError as error:
        raise explain_invalid(error, path, Profile) from None
    inside = profile.container or any(argument.startswith("--container-image") for argument in profile.srun)
    if inside and profile.python is None:
        raise UserError(
            "a container needs the interpreter inside it", where=f"{path}:python", fix="for example python3"
        )
    _check_bash(profile, path)
    return profile


def profiles_folder() -> Path:
    """slurm/profiles of the checkout that this package lies in. An installed package has none."""
    return Path(vjepa_scale.__file__).absolute().parent.parent / "slurm" / "profiles"


def _path_of(name_or_path: str) -> Path:
    if re.fullmatch(r"[\w-]+", name_or_path):
        return profiles_folder() / f"{name_or_path}.yaml"
    return Path(name_or_path)


def _profiles_there() -> str:
    names = sorted(path.stem for path in profiles_folder().glob("*.yaml"))
    known = f"names in {profiles_folder()}: {', '.join(names)}" if names else f"none in {profiles_folder()}"
    return f"give a name or the path of a YAML file; {known}"


def _check_bash(profile: Profile, path: Path) -> None:
    """A quote that is not closed in one line would swallow the rest of the batch script."""
    for number, item in enumerate(profile.setup):
        try:
            checked = subprocess.run(
                ["bash", "--norc", "-n"],
                input="\n".join(_guarded(item)) + "\n",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:  # no bash on this machine: the job will tell
            return
        if checked.returncode or checked.stderr:
            said = checked.stderr.strip().splitlines()[-1:] or ["a syntax error"]
            raise UserError(f"{item!r} is not a whole command of bash: {said[0]}", where=f"{path}:setup.{number}")


# -- for submitit ----------------------------------------------------------------------------------


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
        lines.extend(_guarded(item))
    return lines


def _guarded(item: str) -> list[str]:
    """A setup item that ends the job where it fails; lines of their own, since it may end in a comment."""
    if all(line.lstrip().startswith("#") or not line.strip() for line in item.split("\n")):
        return [item]
    return ["{", item, f"}} || setup_failed {shlex.quote(item.strip().partition(chr(10))[0])}"]


def python_command(profile: Profile) -> str:
    """Container prefix and interpreter of the processes, quoted for bash: ``SlurmExecutor(python=…)``."""
    python = shlex.quote(sys.executable) if profile.python is None else _quoted(profile.python)
    return " ".join([*map(_quoted, shlex.split(profile.container or "")), python])


def _quoted(word: str) -> str:
    """A word for bash in which only ``$NAME`` and ``${NAME}`` are filled in, and never split."""
    if not _VARIABLE.search(word):
        return shlex.quote(word)
    parts: list[str] = []
    end = 0
    for found in _VARIABLE.finditer(word):
        parts += [re.sub(r'([\\"$`])', r"\\\1", word[end : found.start()]), found.group()]
        end = found.end()
    return '"' + "".join(parts) + re.sub(r'([\\"$`])', r"\\\1", word[end:]) + '"'


# -- docs/slurm_profiles.md ------------------------------------------------------------------------

_INTRODUCTION = """\
# Slurm profiles

Made by `python -m vjepa_scale.launch.profile`. A profile says what a site's Slurm wants; a recipe says what to train.

## Adapt one in ten minutes

1. Copy the nearest one: `cp slurm/profiles/example_h100.yaml slurm/profiles/mine.yaml`. With a container:
   `example_apptainer.yaml` (any prefix command) or `example_pyxis.yaml` (`srun --container-image`).
2. Fill in `partition` (`sinfo -s` lists them), `account` and `qos` (`sacctmgr show associations user=$USER
   format=account,partition,qos`); take out what the site does not use.
3. GPUs: `scontrol show node NODE | grep Gres` shows their name. `gpus_per_node` works with most sites; `gres:
   gpu:h100:8` where a type must be named; `gpus_per_node: 0` where nodes are given whole and GPUs are not counted.
   Every process must see all GPUs of its node, so no `gpus-per-task`.
4. `signal_delay_s`: more than the longest step and one checkpoint together. At that distance from the time limit the
   job saves, and is queued again.
5. Look at it: `python tools/launch.py RECIPE launch.profile=mine --dry-run --print-sbatch` prints each script as it
   would be submitted. A key that is wrong is an error that names the file and the key.
6. Try it small before a run of weeks: a recipe with few steps, `launch.nodes=2`.

The order in a job: `modules`, `environment`, `setup`, then srun with `container` and `python` in every process.
The first three run once, on the job's first node; srun hands their variables to all processes. If one fails,
`status` says which and with what exit status, and the job is tried once more: another node may be whole.

Worth knowing:

- Values are text as written: no quotes needed for `NCCL_IB_DISABLE: 1` or `mem: 0`. In `environment` nothing is filled
  in; where a variable is needed, use `setup: ['export CACHE="$SCRATCH/cache"']`.
- An option of sbatch with no key of its own goes under `sbatch` by its long name: `comment`, `wckey`, `licenses`,
  `mail-type`, `begin`, `nice`, `switches`. What the launcher sets itself (`time`, `nodes`, `dependency`, …) is refused.
- `SBATCH_…` variables of your shell (`SBATCH_PARTITION`, `SBATCH_ACCOUNT`) win over a profile: that is sbatch's rule.
- Where `module` is missing in batch scripts, `/etc/profile` is read, as a login shell does. Environment Modules 3 does
  not report a failed load; a line such as `command -v nvcc` in `setup` does.
- A container needs this project's dependencies (README, "Installing by hand"), submitit too, but not the project: jobs
  import the copy in the run folder. Run folder and data must have the same paths inside as outside.

## Every key

| key | default | meaning |
|---|---|---|
"""


def reference() -> str:
    """The whole page."""
    return _INTRODUCTION + "".join(f"| `{key}` | {default} | {meaning} |\n" for key, default, meaning in _rows())


def _rows() -> Iterator[tuple[str, str, str]]:
    for name, field in Profile.model_fields.items():
        default = field.default
        shown = "" if default is None or default in ((), {}) else f"`{str(default).lower()}`"
        yield name, shown, (field.description or "").replace("|", r"\|")


if __name__ == "__main__":
    print(reference(), end="")
