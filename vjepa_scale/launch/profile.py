"""Site profiles: a site's Slurm options, apart from the recipe: partition, account, modules, environment, container.

A profile is a YAML file, by name (slurm/profiles/NAME.yaml here, or a shipped one) or by path. Plain values are read as
text, so Slurm and the shell get ``NCCL_X: yes`` or ``mem: 0`` as written.

python -m vjepa_scale.launch.profile > docs/slurm_profiles.md
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import find_shipped, suggest_shipped
from vjepa_scale.core.yaml_text import parse_yaml
from vjepa_scale.launch import profile_values as values
from vjepa_scale.recipe.load import explain_invalid
from vjepa_scale.recipe.sections import Section

Text = Annotated[str, AfterValidator(values.text)]
Word = Annotated[str, AfterValidator(values.word)]
Words = Annotated[tuple[Word, ...], BeforeValidator(values.as_list)]


def _not_a_key(option: str) -> str:
    if option.replace("-", "_") in Profile.model_fields:
        raise ValueError(f"{option} is a key of the profile itself: write it at the left margin")
    return option


class Profile(Section):
    """One site, or one way to use it."""

    partition: Word | None = Field(None, description="partitions, separated by commas; default: the site's")
    account: Word | None = Field(None, description="the account to charge")
    qos: Word | None = Field(None, description="quality of service")
    reservation: Word | None = Field(None, description="reserved nodes to run on")
    gres: Word | None = Field(None, description="generic resources per node, for example `gpu:h100:8`")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="GPUs to request on each node; default: one per process, if the recipe needs GPUs and `gres` "
        "names none; 0: request none, for sites that allocate whole nodes",
    )
    constraint: Word | None = Field(None, description="features that nodes must have, for example `h100&ib`")
    nodelist: Words = Field((), description="nodes that must be among those used, for example `[gpu01]`")
    exclude: Words = Field((), description="nodes not to use, for example `['gpu[03-05]', gpu17]`")
    exclusive: Annotated[Literal[True, False, "user", "mcs", "topo"], BeforeValidator(values.as_exclusive)] = Field(
        False, description="true: no other job on these nodes"
    )
    mem: Annotated[str, AfterValidator(values.mem)] | None = Field(
        None, description="memory per node with its unit, for example `480G`; 0: all memory; default: the site's"
    )
    signal_delay_s: Annotated[int, Field(ge=1, le=65535)] = Field(
        300,
        description="seconds before the time limit at which the job gets the signal to save and end; Slurm may be up "
        "to 60 s early; longer than a step and a checkpoint take",
    )
    requeue: bool = Field(
        True,
        description="the job may be started again: by Slurm after a node failure or a preemption, by the launcher "
        "after a time limit; false: neither",
    )
    modules: tuple[Annotated[str, AfterValidator(values.module)], ...] = Field(
        (), description="`module load` each of these first, in this order"
    )
    environment: dict[
        Annotated[str, AfterValidator(values.variable_name)], Annotated[str, AfterValidator(values.variable_value)]
    ] = Field({}, description="variables of the job, exactly as written: no variable in a value is expanded")
    setup: tuple[Annotated[str, AfterValidator(values.setup)], ...] = Field(
        (),
        description="lines of bash after that, on the first node, one command per item; if the status of one is "
        "not 0 the job fails",
    )
    container: Annotated[str, AfterValidator(values.command)] | None = Field(
        None,
        description="command put before Python in every process, for example `apptainer exec --nv IMAGE.sif`; `$NAME` "
        "is expanded on the first node; `python` is then needed",
    )
    python: Annotated[str, AfterValidator(values.shell_text)] | None = Field(
        None,
        description="the interpreter of the processes, in the container if there is one; default: the launching one",
    )
    srun: Annotated[tuple[Text, ...], AfterValidator(values.srun)] = Field(
        (), description="more arguments of srun, for example `[--container-image=/images/vjepa.sqsh]`"
    )
    sbatch: dict[
        Annotated[str, AfterValidator(values.option), AfterValidator(_not_a_key)],
        Annotated[str, AfterValidator(values.text), BeforeValidator(values.option_value)],
    ] = Field(
        {},
        description="any other option of sbatch by its long name, for example `{licenses: lustre, mail-type: FAIL}`; "
        "true for one without a value",
    )


# -- loading ---------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads plain values as text; an empty value is None."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_profile(name_or_path: str | None) -> Profile:
    """Reads a site profile.

    name_or_path: a path; or NAME for slurm/profiles/NAME.yaml below the current folder, or else a shipped profile;
                  None: Slurm's own defaults.
    Raises UserError naming ``file:key`` and what would work.
    """
    if name_or_path is None:
        return Profile()
    path = profile_file(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        fix = f"give a name or the path of a YAML file; {suggest_shipped('profiles', name_or_path)}"
        raise UserError("no such profile", where=path, fix=fix) from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())}", where=path) from None
    tree = parse_yaml(text, _Loader, where=path)
    if tree is not None and not isinstance(tree, dict):
        raise UserError("a profile is a mapping of keys", where=path, fix="for example partition: gpu")
    for key in tree or {}:
        option = str(key).replace("_", "-")
        if key not in Profile.model_fields and option in values.LAUNCHERS:
            raise UserError(f"{option} is the launcher's: {values.LAUNCHERS[option]}", where=f"{path}:{key}")
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


# The folder of a user's profiles, below the current folder; in a checkout it also has the shipped ones.
OWN = Path("slurm", "profiles")


def profile_file(name_or_path: str) -> Path:
    """Returns the file of a profile, given as for ``load_profile``. It need not exist."""
    given = Path(name_or_path)
    if given.is_file():
        return given
    if not re.fullmatch(r"[\w-]+(\.yaml)?", name_or_path):
        return given
    own = OWN / f"{given.stem}.yaml"
    return own if own.is_file() else find_shipped("profiles", name_or_path) or own


def placeholders(profile: Profile) -> Iterator[tuple[str, str]]:
    """Yields key and value of what the example profiles leave to the user: values that begin with ``YOUR_``."""
    for key, value in profile.model_dump().items():
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
        for name, text in [(key, value), *((f"{key}.{inner}", item) for inner, item in items)]:
            if isinstance(text, str) and text.startswith("YOUR_"):
                yield name, text


def _check_bash(profile: Profile, path: Path) -> None:
    """Raises UserError for invalid bash: an unclosed quote in one line would swallow the rest of the batch script."""
    for number, item in enumerate(profile.setup):
        try:
            checked = subprocess.run(
                ["bash", "--norc", "-n"],
                input="\n".join(guarded(item)) + "\n",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:  # no bash on this machine: the job will fail with the error
            return
        if checked.returncode or checked.stderr:
            said = checked.stderr.strip().splitlines()[-1:] or ["a syntax error"]
            raise UserError(f"{item!r} is not a whole command of bash: {said[0]}", where=f"{path}:setup.{number}")


def guarded(item: str) -> list[str]:
    """Returns lines of bash that run a setup item and end the job if it fails. An item may end in a comment, so the
    closing brace has its own line."""
    if all(line.lstrip().startswith("#") or not line.strip() for line in item.split("\n")):
        return [item]
    return ["{", item, f"}} || setup_failed {shlex.quote(item.strip().partition(chr(10))[0])}"]


# -- docs/slurm_profiles.md ------------------------------------------------------------------------

_INTRODUCTION = """\
# Slurm profiles

Made by `python -m vjepa_scale.launch.profile`. A profile says what a site's Slurm wants; a recipe says what to train.

## Adapt one in ten minutes

1. Copy the nearest one: `cp slurm/profiles/example_h100.yaml slurm/profiles/mine.yaml`. With a container:
   `example_apptainer.yaml` (any prefix command) or `example_pyxis.yaml` (`srun --container-image`).
2. Fill in `partition` (`sinfo -s` lists them), `account` and `qos` (`sacctmgr show associations user=$USER
   format=account,partition,qos`); remove what the site does not use.
3. GPUs: `scontrol show node NODE | grep Gres` shows their name. `gpus_per_node` works with most sites; `gres:
   gpu:h100:8` if a type must be named; `gpus_per_node: 0` if whole nodes are allocated and GPUs are not counted.
   The count must be the recipe's `launch.tasks_per_node`, one process per GPU: a launch with fewer GPUs is refused, and
   its plan says how many GPUs stay idle. Every process must see all GPUs of its node, so no `gpus-per-task`.
4. `signal_delay_s`: more than the longest step and one checkpoint together. So long before the time limit the job
   saves, and is requeued.
5. Check it: `python tools/launch.py RECIPE launch.profile=mine --dry-run --print-sbatch` prints each script as it
   would be submitted, and on standard error why a launch would be refused (exit code 2). A wrong key, or a value that
   still begins with `YOUR_`, is an error that names the file and the key.
6. Test it before a run of weeks: a recipe with few steps, `launch.nodes=2`.

The order in a job: `modules`, `environment`, `setup`, then srun with `container` and `python` in every process.
The first three run once, on the job's first node; srun passes their variables to all processes. If one fails,
`status` has its name and exit status, and the job is restarted once, because another node may work.

Notes:

- Values are text as written: no quotes needed for `NCCL_IB_DISABLE: 1` or `mem: 0`. In `environment` no variable is
  expanded; if you need one, use `setup: ['export CACHE="$SCRATCH/cache"']`.
- An option of sbatch without its own key goes under `sbatch` by its long name: `comment`, `wckey`, `licenses`,
  `mail-type`, `begin`, `nice`, `switches`. What the launcher sets itself (`time`, `nodes`, `dependency`, …) is refused.
- `SBATCH_…` variables of your shell (`SBATCH_PARTITION`, `SBATCH_ACCOUNT`) override a profile: that is sbatch's rule.
- If `module` is missing in batch scripts, `/etc/profile` is read, as a login shell does. Environment Modules 3 does
  not report a failed load; a line such as `command -v nvcc` in `setup` does.
- A container needs this project's dependencies ([install.md](install.md)), submitit included, but not the project:
  jobs import the copy in the run folder. Run folder and data must have the same paths inside as outside.

## Every key

| key | default | meaning |
|---|---|---|
"""


def reference() -> str:
    """Returns the whole page."""
    return _INTRODUCTION + "".join(f"| `{key}` | {default} | {meaning} |\n" for key, default, meaning in _rows())


def _rows() -> Iterator[tuple[str, str, str]]:
    for name, field in Profile.model_fields.items():
        default = field.default
        shown = "" if default is None or default in ((), {}) else f"`{str(default).lower()}`"
        yield name, shown, (field.description or "").replace("|", r"\|")


if __name__ == "__main__":
    print(reference(), end="")
