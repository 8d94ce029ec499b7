"""Site profiles: each mistake is one line, and bash and sbatch read what was written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import submitit

from tests.processes import LIMIT_S
from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.profile import Profile, load_profile
from vjepa_scale.launch.sbatch import python_command, setup_lines, submitit_parameters

ROOT = Path(__file__).parents[2]
SHIPPED = ["example_apptainer", "example_h100", "example_pyxis", "sandbox"]


class Executor(submitit.SlurmExecutor):
    """The real one, where srun need not be installed to write a script."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def profile_of(tmp_path: Path, text: str) -> Profile:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return load_profile(str(path))


def script_of(profile: Profile, folder: Path, *, needs_gpus: bool = False, **more: Any) -> str:
    executor = Executor(folder=folder / "logs", python=python_command(profile))
    executor.update_parameters(
        **submitit_parameters(profile, needs_gpus=needs_gpus, tasks_per_node=2),
        job_name="run-pretrain",
        nodes=2,
        ntasks_per_node=2,
        cpus_per_task=3,
        time=60,
        **more,
    )
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def bash(lines: list[str], *more: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run setup lines, then others, in a bash with an environment of its own."""
    script = "\n".join([*lines, *more]) + "\n"
    env = {"PATH": os.environ["PATH"], **(env or {})}
    return subprocess.run(["bash", "--norc", "-c", script], env=env, capture_output=True, timeout=LIMIT_S)


# -- mistakes --------------------------------------------------------------------------------------

MISTAKES = {
    "partitions: gpu": (":partitions: ", "did you mean 'partition'?"),
    "time: 60": (":time: time is the launcher's", "launch.timeout_min of the recipe"),
    "cpus_per_task: 8": (":cpus_per_task: cpus-per-task is the launcher's", "launch.cpus_per_task of the recipe"),
    "walltime: 60": (":walltime: unknown key", "known here: partition, "),
    "partition: [a, b]": (":partition: ", "must be text"),
    "partition: a b": (":partition: ", "holds a space"),
    "account: ''": (":account: ", "is empty"),
    'qos: "a\\nrm -rf x"': (":qos: ", "holds a line break"),
    "account: $USER": (":account: ", "write it out"),
    "gpus_per_node: many": (":gpus_per_node: ", "'many'"),
    "gpus_per_node: -1": (":gpus_per_node: ", "'-1'"),
    "mem: 480": (":mem: ", "480G"),
    "mem: lots": (":mem: ", "480G"),
    "exclusive: maybe": (":exclusive: ", "'maybe'"),
    "requeue: 7": (":requeue: ", "'7'"),
    "signal_delay_s: 0": (":signal_delay_s: ", "must be at least 1, not "),
    "signal_delay_s: 5m": (":signal_delay_s: ", "'5m'"),
    "modules: cuda/12": (":modules: ", "must be a list, not "),
    "modules: [cuda/12 nccl]": (":modules.0: ", "one module an item"),
    "environment: {1X: a}": (":environment.1X: ", "not a variable's name"),
    "environment: {'A;rm x': a}": (":environment.A;rm x: ", "not a variable's name"),
    "environment: {RANK: 0}": (":environment.RANK: ", "differs from process to process"),
    "environment: {A: [1]}": (":environment.A: ", "must be text"),
    "environment: {A:, B: 1}": (":environment.A: ", "not None"),
    "environment: [A=1]": (":environment: ", "must be a section of keys"),
    "setup: ['#SBATCH --nice=3']": (":setup.0: ", "write it under sbatch"),
    'setup: [true, "echo \'open"]': (":setup.1: ", "not a whole command"),
    "setup: ['if true; then', 'fi']": (":setup.0: ", "not a whole command"),
    "setup: ['sleep 1 |']": (":setup.0: ", "not a whole command"),
    "srun: [hostname]": (":srun: ", "is not an option"),
    "srun: [--label, --container-image=a, b]": (":srun: ", "'b' is not an option"),
    "srun: [--cpu-bind cores]": (":srun: ", "write --option=value"),
    "srun: [--nodes=1]": (":srun: ", "--nodes is the launcher's"),
    "srun: [-n4]": (":srun: ", "-n4 is the launcher's"),
    "srun: ['--container-image=~/a.sqsh']": (":srun.0: ", "write it out"),
    "srun: [--container-image=a.sqsh]": (":python: ", "for example python3"),
    "container: apptainer exec a.sif": (":python: ", "for example python3"),
    "{container: 'apptainer exec \"a.sif', python: p}": (":container: ", "no closing quotation"),
    "{container: source x && apptainer exec a.sif, python: p}": (":container: ", "belong in setup"),
    "{container: apptainer exec $(pwd)/a.sif, python: p}": (":container: ", "only $NAME"),
    "python: ~/venv/bin/python": (":python: ", "write $HOME"),
    "sbatch: {--licenses: a}": (":sbatch.--licenses: ", "without dashes"),
    "sbatch: {p: gpu}": (":sbatch.p: ", "long name"),
    "sbatch: {partition: gpu}": (":sbatch.partition: ", "key of the profile itself"),
    "sbatch: {gpus-per-node: 8}": (":sbatch.gpus-per-node: ", "key of the profile itself"),
    "sbatch: {comment: }": (":sbatch.comment: ", "write true"),
    "sbatch: {contiguous: false}": (":sbatch.contiguous: ", "take the line out"),
    'sbatch: {comment: "a\\n#SBATCH --uid=0"}': (":sbatch.comment: ", "line break"),
    "sbatch: {comment: 'a\\b'}": (":sbatch.comment: ", "drops backslashes"),
    "- partition": (": ", "mapping of keys"),
    "partition: {": (": ", "not readable as YAML"),
    "partition: a\nqos: b\npartition: c": (":partition: ", "'partition' is there twice"),
    "sbatch: !!python/name:os.system x": (": ", "not readable as YAML"),
}

LAUNCHERS_OPTIONS = (
    "job-name nodes ntasks ntasks-per-node cpus-per-task time dependency kill-on-invalid-dep output error open-mode "
    "signal requeue no-requeue array chdir no-kill gpus-per-task parsable quiet test-only wait wrap clusters"
)


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_that_names_file_and_key(text: str, tmp_path: Path) -> None:
    where, what = MISTAKES[text]
    with pytest.raises(UserError) as caught:
        profile_of(tmp_path, text)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'site.yaml'}{where}"), line
    assert what in line
    assert "\n" not in line


@pytest.mark.parametrize("option", LAUNCHERS_OPTIONS.split())
def test_what_the_launcher_sets_is_refused(option: str, tmp_path: Path) -> None:
    for spelling in (option, option.replace("-", "_")):
        with pytest.raises(UserError, match=rf"site\.yaml:sbatch\.{spelling}: {option} is the launcher's: "):
            profile_of(tmp_path, f"sbatch: {{{spelling}: 1}}")


def test_a_profile_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names do not depend on the current folder
    for name in ("h100", "h100.yaml", "./h100"):
        with pytest.raises(UserError) as caught:
            load_profile(name)
        assert "no such profile" in str(caught.value)
        assert ", ".join(SHIPPED) in str(caught.value)
    with pytest.raises(UserError, match="Is a directory"):
        load_profile(str(tmp_path))
    assert load_profile("sandbox").partition == "main"


# -- values ----------------------------------------------------------------------------------------


def test_values_are_the_text_that_stands_there(tmp_path: Path) -> None:
    profile = profile_of(
        tmp_path,
        "partition:\nmem: 0\nreservation: 2026-11-21\nexclude: gpu[1,3]\nnodelist: [010, 1e3]\nexclusive: user\n"
        "environment: {A: yes, B: 010, C: 1.50, D: 1:30, E: 'null', F: '', G: 0x1F, H: 1_000}\n",
    )
    assert (profile.partition, profile.mem, profile.reservation) == (None, "0", "2026-11-21")
    assert (profile.exclude, profile.nodelist, profile.exclusive) == (("gpu[1,3]",), ("010", "1e3"), "user")
    wanted = {"A": "yes", "B": "010", "C": "1.50", "D": "1:30", "E": "null", "F": "", "G": "0x1F", "H": "1_000"}
    assert profile.environment == wanted
    assert profile_of(tmp_path, "# nothing yet\n") == Profile()


NASTY = {
    "SPACES": "  two  spaces ",
    "QUOTES": """it's "quoted" `date` $(date)""",
    "DOLLAR": "$HOME ${PATH} $$ \\$ \\",
    "LINES": "first\nsecond\n\n#SBATCH --nice=5\nEOF\n",
    "GLOB": "* ? [a-z] {a,b} ~ !! # ;&|<>",
    "UNICODE": "θ̄ ← m·θ̄",
    "EMPTY": "",
}


def test_environment_arrives_exactly(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "environment:\n" + "".join(f"  {name}: {_double_quoted(value)}\n" for name, value in NASTY.items())
    )
    profile = load_profile(str(tmp_path / "site.yaml"))
    done = bash(setup_lines(profile), "env -0")
    assert done.returncode == 0, done.stderr
    arrived = dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if "=" in entry)
    assert {name: arrived.get(name) for name in NASTY} == NASTY
    assert subprocess.run(["bash", "-n"], input=script_of(profile, tmp_path), text=True).returncode == 0


def _double_quoted(text: str) -> str:
    """Text as YAML's double-quoted scalar."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


# -- setup -----------------------------------------------------------------------------------------


def test_setup_runs_in_order_and_in_the_shell_of_the_job(tmp_path: Path) -> None:
    profile = profile_of(
        tmp_path,
        "modules: [one/1.0, two]\nenvironment: {A: from_environment}\n"
        "setup:\n- B=$A/more # a comment\n- export B\n- '# only a comment'\n"
        "- |\n  for n in 1 2; do\n    C+=$n\n  done\n"
        "- f() { D=$1; }\n- f here\n- false || true\n",
    )
    module = 'module() { loaded+="$* ($A); "; }'
    done = bash([module], *setup_lines(profile), 'echo "$loaded|$B|$C|$D"; env | grep ^B=')
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.decode()
        == "load one/1.0 (); load two (); |from_environment/more|12|here\nB=from_environment/more\n"
    )
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("text", "status", "failed"),
    [
        ("setup: ['true', '(exit 7)', 'echo went on']", 7, "(exit 7)"),
        ("setup: ['false # no matter', 'echo went on']", 1, "false # no matter"),
        ("setup: ['cd /nonexistent', 'echo went on']", 1, "cd /nonexistent"),
        ("setup: ['no_such_command \"it''s\"', 'echo went on']", 127, 'no_such_command "it\'s"'),
        ("environment: {UID: 5}\nsetup: ['echo went on']", 1, "export UID"),
        ("modules: [good, bad]\nsetup: ['echo went on']", 3, "module load bad"),
    ],
)
def test_a_failing_setup_ends_the_job(text: str, status: int, failed: str, tmp_path: Path) -> None:
    module = 'module() { [ "$2" = good ] || return 3; }'
    done = bash([module, *setup_lines(profile_of(tmp_path, text))], "echo went on")
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.decode().splitlines()[-1] == f"error: status {status} in the setup of this job: {failed}"


@pytest.mark.skipif(shutil.which("modulecmd") is not None, reason="this machine has environment modules")
def test_a_machine_without_modules_ends_the_job(tmp_path: Path) -> None:
    done = bash(setup_lines(profile_of(tmp_path, "modules: [cuda/12]")), "echo went on")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines()[-1] == "error: status 127 in the setup of this job: module load cuda/12"


def test_srun_gets_the_cores_that_sbatch_asked_for() -> None:
    show = 'echo "${SRUN_CPUS_PER_TASK-unset}"'
    assert bash(setup_lines(Profile()), show, env={"SLURM_CPUS_PER_TASK": "12"}).stdout == b"12\n"
    assert bash(["set -u", *setup_lines(Profile())], show).stdout == b"unset\n"


# -- Python ----------------------------------------------------------------------------------------


def test_container_and_python_are_words_of_bash(tmp_path: Path) -> None:
    shower = tmp_path / "a folder" / "show it"
    shower.parent.mkdir()
    shower.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    shower.chmod(0o755)
    profile = profile_of(
        tmp_path,
        f"""container: '"{shower}" exec --bind $DATA:/d "x ;|&`echo`"'\n""".replace("`echo`", "*")
        + 'python: ${ENVS}/it\'s "3"/python\n',
    )
    done = bash([python_command(profile) + " -u"], env={"DATA": "/my data", "ENVS": "/en vs"})
    assert done.stderr == b""
    assert done.stdout.decode().splitlines() == [
        "exec",
        "--bind",
        "/my data:/d",
        "x ;|&*",
        '/en vs/it\'s "3"/python',
        "-u",
    ]


def test_the_launching_python_is_the_default() -> None:
    done = bash([python_command(Profile()) + ' -c "import sys; print(sys.executable)"'])
    assert done.stdout.decode().strip() == sys.executable


# -- sbatch ----------------------------------------------------------------------------------------

FULL = """
partition: gpu,long
account: it's
qos: high
reservation: res1
gres: gpu:h100:2
constraint: a&b|c
nodelist: [n1, 'n[2]']
exclude: [n3]
exclusive: true
mem: 480G
signal_delay_s: 77
requeue: false
srun: [--cpu-bind, cores, "--container-name=two words"]
sbatch: {wckey: key, licenses: 'a:1,b', comment: 'it''s # "one" comment; ok', contiguous: true, mail_type: 'FAIL,END'}
"""


def directives(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}


def test_the_script_says_what_the_profile_says(tmp_path: Path) -> None:
    script = script_of(profile_of(tmp_path, FULL), tmp_path, needs_gpus=True)
    lines = directives(script)
    assert lines >= {
        "--partition=gpu,long",
        "--qos=high",
        "--reservation=res1",
        "--gres=gpu:h100:2",
        "--constraint='a&b|c'",
        "--nodelist='n1,n[2]'",
        "--exclude=n3",
        "--exclusive",
        "--mem=480G",
        "--signal=USR2@77",
        "--no-requeue",
        "--wckey=key",
        "--licenses=a:1,b",
        "--contiguous",
        "--mail-type=FAIL,END",
        "--nodes=2",
    }
    assert not any(line.startswith(("--gpus", "--requeue")) for line in lines)
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert " --export=ALL --cpu-bind cores '--container-name=two words' " in srun
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_site_may_say_what_srun_hands_on(tmp_path: Path) -> None:
    script = script_of(profile_of(tmp_path, "srun: ['--export=ALL,A=1']\nsbatch: {export: NONE}"), tmp_path)
    assert "--export=NONE" in directives(script)
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert re.findall(r"--export=\S+", srun) == ["--export=ALL,A=1"]


def test_the_defaults_ask_for_nothing_of_a_site(tmp_path: Path) -> None:
    assert {re.sub("=.*", "", line) for line in directives(script_of(Profile(), tmp_path))} == {
        *("--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--time"),
        *("--output", "--error", "--open-mode", "--signal", "--requeue"),
    }


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("", {"--gpus-per-node=2"}),
        ("gpus_per_node: 4", {"--gpus-per-node=4"}),
        ("gpus_per_node: 0", set()),
        ("gres: gpu:8", {"--gres=gpu:8"}),
        ("gres: 'nvme:1,gpu:h100:8'", {"--gres=nvme:1,gpu:h100:8"}),
        ("gres: nvme:1", {"--gres=nvme:1", "--gpus-per-node=2"}),
        ("sbatch: {gpus: 16}", {"--gpus=16"}),
    ],
)
def test_gpus_are_asked_for_once(text: str, asked: set[str], tmp_path: Path) -> None:
    script = script_of(profile_of(tmp_path, text), tmp_path, needs_gpus=True)
    assert {line for line in directives(script) if line.startswith(("--gpus", "--gres"))} == asked


def test_a_job_without_gpus_asks_for_none(tmp_path: Path) -> None:
    assert not any("gpu" in line.partition("=")[0] for line in directives(script_of(Profile(), tmp_path)))


@pytest.mark.slurm
def test_sbatch_reads_it_so(tmp_path: Path) -> None:
    """The real sbatch, which parses the script and says so before it looks for a controller (there is none)."""
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nNodeName=localhost\nMessageTimeout=1\n"
        "PartitionName=gpu Nodes=localhost\n"
    )
    text = FULL + "environment: {A: \"a\\n#SBATCH --nice=5\"}\nsetup: ['echo x']\n"
    (tmp_path / "job.sh").write_text(script_of(profile_of(tmp_path, text), tmp_path))
    done = subprocess.run(
        ["sbatch", "--verbose", str(tmp_path / "job.sh")],
        env={"PATH": os.environ["PATH"], "SLURM_CONF": str(tmp_path / "slurm.conf")},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    shown = {
        found[1]: found[2] for line in done.stderr.splitlines() if (found := re.match(r"sbatch: (\S+) +: (.*)", line))
    }
    assert (
        shown.items()
        >= {
            "partition": "gpu,long",
            "account": "it's",
            "qos": "high",
            "reservation": "res1",
            "gres": "gres:gpu:h100:2",
            "constraint": "a&b|c",
            "exclude": "n3",
            "mem": "480G",
            "signal": "USR2@77",
            "wckey": "key",
            "licenses": "a:1,b",
            "comment": 'it\'s # "one" comment; ok',
            "contiguous": "set",
            "no-requeue": "no-requeue",
            "nodes": "2",
            "time": "01:00:00",
        }.items()
    ), done.stderr
    assert "nice" not in shown


# -- what is shipped -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert profile == load_profile(str(ROOT / "slurm" / "profiles" / f"{name}.yaml"))
    for needs_gpus in (False, True):
        script = script_of(profile, tmp_path / "a folder", needs_gpus=needs_gpus)
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert sorted(path.stem for path in (ROOT / "slurm" / "profiles").iterdir()) == SHIPPED


def test_the_page_is_up_to_date() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "vjepa_scale.launch.profile"], capture_output=True, check=True, cwd=ROOT
    )
    page = (ROOT / "docs" / "slurm_profiles.md").read_bytes()
    assert run.stdout == page, "run: python -m vjepa_scale.launch.profile > docs/slurm_profiles.md"
    for name, field in Profile.model_fields.items():
        assert field.description, name


def test_a_login_node_needs_no_torch() -> None:
    code = "import sys, vjepa_scale.launch.profile, vjepa_scale.launch.snapshot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
