"""A real Slurm cluster for tests: slurm/sandbox, started, asked and hurt through Slurm's own commands."""

import os
import pwd
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
SANDBOX = ROOT / "slurm" / "sandbox"
# Ends what hangs. It is no measure of speed: two cores may be shared with another chain of four ranks.
PATIENCE_S = 600.0
APT_LINE = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"

# A job in one of these stays there (a requeued one is PENDING again, with a higher Restarts).
ENDED = frozenset(
    ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"]
)


def missing_programs(accounting: bool = False) -> str:
    """Why no sandbox can start here, with the line that installs it; empty where all is installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    needed = ["munged", "slurmctld", "slurmd", "sbatch", *(["slurmdbd", "mariadbd"] if accounting else [])]
    missing = [name for name in needed if shutil.which(name, path=path) is None]
    line = f"{APT_LINE} slurmdbd mariadb-server-core" if accounting else APT_LINE
    return f"no {', '.join(missing)}: {line}" if missing else ""


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, under its name."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        text = str(error)
    return "\n".join([f"--- {path}", *text.splitlines()[-lines:]])


def wait_until(
    condition: Callable[[], T],
    timeout: float,
    what: str | Callable[[], str],
    logs: Callable[[], Collection[Path]] | Collection[Path] = (),
    every: float = 0.1,
) -> T:
    """The first true value of ``condition``.

    AssertionError after ``timeout`` seconds: what it waited for, and the ends of the logs. ``what`` and ``logs`` may
    be functions, asked at that moment.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            said = what() if callable(what) else what
            files = logs() if callable(logs) else logs
            raise AssertionError("\n".join([f"waited {timeout:g} s for: {said}", *map(tail, files)]))
        time.sleep(every)
    return value


class Cluster:
    """One sandbox in the folder ``base``, and commands for it.

    ``user`` is who runs the sandbox and the commands: None is who runs the tests. ``folder`` (above ``base``) is that
    user's own: a place for runs.
    """

    def __init__(self, base: Path, user: "PlainUser | None" = None) -> None:
        self.base = base
        self.user = user
        self.folder = base.parent
        self.environment = self._environment()

    def _environment(self) -> dict[str, str]:
        """What a command needs to reach this cluster and no other; this Python's programs come first on PATH."""
        outer = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN", "SALLOC", "SUBMITIT", "PYTEST"))
        }
        path = f"{Path(sys.executable).parent}:{outer.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
        environment = {
            **outer,
            "SLURM_CONF": str(self.base / "etc" / "slurm.conf"),
            "PATH": path,
            "OMP_NUM_THREADS": "1",
        }
        return environment if self.user is None else {**environment, **self.user.environment}

    # --- commands ---

    def command(self, argv: Sequence[str | Path], cwd: Path | None = None) -> dict[str, Any]:
        """The arguments of subprocess.run or Popen that make it this command, as the cluster's user.

        ``cwd`` is the repository where it is not given.
        """
        plain = [str(word) for word in argv]
        if self.user is None:
            return {"args": plain, "cwd": cwd or ROOT, "env": self.environment}
        return {"args": self.user.enter(plain, cwd or ROOT), "env": self.environment}

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = PATIENCE_S,
        **kwargs: Any,
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end, output captured as text; AssertionError with that output where ``check`` fails."""
        arguments = {**self.command(argv, cwd), "text": True, "capture_output": True, "timeout": timeout, **kwargs}
        done = subprocess.run(**arguments, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def popen(self, argv: Sequence[str | Path], *, cwd: Path | None = None, **kwargs: Any) -> "subprocess.Popen[str]":
        """The command started, as text; its pid is the command's own, so signals reach it."""
        return subprocess.Popen(**{**self.command(argv, cwd), "text": True, **kwargs})

    # --- the sandbox ---

    def start(self, nodes: int = 3, cpus: int = 4, accounting: bool = False, **options: int) -> None:
        """start.sh with these options; further ones by their names: ``slurmd_timeout=10``, ``kill_wait=2``."""
        flags = {"nodes": nodes, "cpus": cpus, "accounting": "slurmdbd" if accounting else "none", **options}
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        self.run([SANDBOX / "start.sh", "--base", self.base, *words])

    def stop(self) -> None:
        """End all of it; harmless when it has ended or was never started."""
        if (self.base / ".slurm_sandbox").exists():
            self.run([SANDBOX / "stop.sh", "--base", self.base])

    def kill_node(self, node: str, power_off: bool = False) -> None:
        """kill -9 of a node's slurmd: its steps and tasks run on. With ``power_off`` they die in the same moment."""
        self.run([SANDBOX / "node.sh", "--base", self.base, "power-off" if power_off else "kill", node])

    def start_node(self, node: str) -> None:
        """Start a killed node and wait until Slurm gives it jobs again."""
        self.run([SANDBOX / "node.sh", "--base", self.base, "start", node])
        self.wait_until(
            lambda: self.nodes().get(node) in ("idle", "mixed", "allocated"), PATIENCE_S, f"node {node} is back"
        )

    def stop_controller(self) -> None:
        """End slurmctld: from now on Slurm's commands fail, running jobs run on."""
        self.run([SANDBOX / "controller.sh", "--base", self.base, "stop"])

    def start_controller(self) -> None:
        self.run([SANDBOX / "controller.sh", "--base", self.base, "start"])
        self._wait_for_nodes()

    def forget(self) -> None:
        """End all jobs and restart the controller with an empty state: no earlier job is known to Slurm."""
        self.run([SANDBOX / "controller.sh", "--base", self.base, "forget"])
        self._wait_for_nodes()

    def clean(self, keep: Collection[str] = ()) -> None:
        """Cancel all jobs but these ids, wait for their end, and bring killed nodes and the controller back."""
        if not self._daemon_runs("slurmctld"):
            self.run([SANDBOX / "controller.sh", "--base", self.base, "start"])
            self._wait_for_answer()
        for node in self.node_names:
            if not self._daemon_runs(f"slurmd.{node}"):
                self.run([SANDBOX / "node.sh", "--base", self.base, "start", node])

        def left() -> list[str]:
            return [job for job in self.queue() if job not in keep]

        if jobs := left():
            self.scancel(*jobs)
        self.wait_until(lambda: not left(), PATIENCE_S, lambda: f"the end of jobs {left()}")
        self._wait_for_nodes()

    @property
    def node_names(self) -> list[str]:
        """In order: n1, n2, … or, for a plain user, 127.0.0.1, 127.0.0.2, …"""
        lines = (self.base / "etc" / "slurm.conf").read_text().splitlines()
        return [line.split()[0].removeprefix("NodeName=") for line in lines if line.startswith("NodeName=")]

    def nodes(self) -> dict[str, str]:
        """Node name -> state in sinfo's words, without its marks: idle, mixed, allocated, down, completing …"""
        lines = self.run(["sinfo", "-h", "-N", "-o", "%N %T"], check=False).stdout.splitlines()
        return {name: state.rstrip("*~#!%$@^-+") for name, state in (line.split() for line in lines)}

    def _daemon_runs(self, name: str) -> bool:
        """As daemon_runs of common.sh: a pid file holds the pid and the time of the process's start."""
        try:
            pid, born = (self.base / "run" / f"{name}.pid").read_text().split()
            fields = (Path("/proc") / pid / "stat").read_text().rpartition(") ")[2].split()
        except (OSError, ValueError):
            return False
        return fields[0] != "Z" and fields[19] == born

    def _wait_for_answer(self) -> None:
        self.wait_until(
            lambda: self.run(["scontrol", "ping"], check=False).returncode == 0, PATIENCE_S, "slurmctld answers"
        )

    def _wait_for_nodes(self) -> None:
        def up() -> bool:
            states = self.nodes()
            return set(states) == set(self.node_names) and set(states.values()) <= {"idle", "mixed", "allocated"}

        self.wait_until(up, PATIENCE_S, lambda: f"all nodes are up: {self.nodes()}")

    # --- jobs ---

    def sbatch(self, *options: str | Path, script: str | None = None, wrap: str | None = None, **kwargs: Any) -> str:
        """Submit ``script`` (a text, #! line included) or a ``wrap`` line, and return the job's id.

        What it prints goes to ``output(id)`` unless ``-o`` is among the options.
        """
        words = ["sbatch", "--parsable", *map(str, options)]
        if not any(word.startswith(("-o", "--output")) for word in words):
            words += ["-o", str(self.output("%j"))]
        if wrap is not None:
            words += ["--wrap", wrap]
        return self.run(words, input=script, **kwargs).stdout.strip().split(";")[0]

    def output(self, job_id: str) -> Path:
        """Where sbatch (above) leaves what a job prints."""
        folder = self.base / "log" / "jobs"
        if not folder.exists():
            self.run(["mkdir", "-p", folder])
        return folder / f"{job_id}.out"

    def scancel(self, *words: str) -> None:
        self.run(["scancel", *words])

    def scontrol(self, *words: str, check: bool = True) -> str:
        return self.run(["scontrol", *words], check=check).stdout

    def job(self, job_id: str) -> dict[str, str]:
        """``scontrol -o show job``: JobState, Reason, Restarts, ExitCode, NodeList, …; {} for a job unknown to it."""
        done = self.run(["scontrol", "-o", "show", "job", job_id], check=False)
        if done.returncode != 0:
            return {}
        line = next(iter(done.stdout.splitlines()), "")
        return dict(word.split("=", 1) for word in line.split(" ") if "=" in word)

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED, …; empty if Slurm knows no such job."""
        return self.job(job_id).get("JobState", "")

    def queue(self) -> list[str]:
        """The ids of all jobs that have not ended."""
        return sorted(set(self.run(["squeue", "-h", "-a", "-o", "%A"]).stdout.split()))

    def jobs(self, name: str | None = None) -> list[dict[str, str]]:
        """All jobs that Slurm knows, ended ones too, oldest first; those of one name where it is given."""
        lines = self.run(["scontrol", "-o", "show", "job"]).stdout.splitlines()
        found = [
            dict(word.split("=", 1) for word in line.split(" ") if "=" in word) for line in lines if "JobId=" in line
        ]
        return [job for job in found if name is None or job["JobName"] == name]

    def wait_for(
        self, job_id: str, states: str | Collection[str] = ENDED, timeout: float = PATIENCE_S
    ) -> dict[str, str]:
        """The job once it is in one of ``states``. Fails at once where it has ended in another one."""
        wanted = {states} if isinstance(states, str) else set(states)
        seen: list[str] = []

        def arrived() -> dict[str, str]:
            job = self.job(job_id)
            state = job.get("JobState", "unknown to Slurm")
            if not seen or seen[-1] != state:
                seen.append(state)
            if state in wanted:
                return job
            if state in ENDED:
                raise AssertionError("\n".join([f"job {job_id} ended {state}, {job}", *map(tail, self.logs(job_id))]))
            return {}

        what = f"job {job_id} is {' or '.join(sorted(wanted))}"
        return self.wait_until(arrived, timeout, lambda: f"{what}; it was {seen}, now {self.job(job_id)}", job_id)

    def logs(self, job_id: str | None = None) -> list[Path]:
        """What to look at after a failure: the controller's log, and what the job has printed."""
        files = [self.base / "log" / "slurmctld.log"]
        return files if job_id is None else [*files, *(self.base / "log" / "jobs").glob(f"{job_id}.out")]

    def wait_until(
        self, condition: Callable[[], T], timeout: float, what: str | Callable[[], str], job_id: str | None = None
    ) -> T:
        """wait_until (above); a failure shows the end of slurmctld's log too."""
        return wait_until(condition, timeout, what, lambda: self.logs(job_id))


class PlainUser:
    """A user who is not root, for tests that run as root (where they do not, they are a plain user's already).

    Python and the repository may lie below a folder that others cannot enter, such as /root. So the commands run in a
    mount namespace of their own: a folder that all can enter hides each such ancestor there, with only the needed
    folders bound back in. Outside that namespace nothing changes.
    """

    NAME = "nobody"

    def __init__(self, folder: Path) -> None:
        """``folder`` holds the user's home, runs and sandbox; made by the caller, given to the user here."""
        entry = pwd.getpwnam(self.NAME)
        self.uid, self.gid = entry.pw_uid, entry.pw_gid
        self.folder = folder
        home, temporary = folder / "home", folder / "tmp"
        home.mkdir()
        temporary.mkdir()
        for path in (folder, home, temporary):
            os.chown(path, self.uid, self.gid)
        self.environment = {
            "HOME": str(home),
            "USER": self.NAME,
            "LOGNAME": self.NAME,
            "TMPDIR": str(temporary),
            # git reads no repository that belongs to somebody else
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": str(ROOT),
            **dict.fromkeys(["XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME"], str(home / ".cache")),
        }
        # The namespace lives as long as this process, which ends with the tests' process.
        self.keeper = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "--", "bash", "-euc", self._mounts()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.keeper.stdout is not None
        if self.keeper.stdout.readline() != "ready\n":
            raise AssertionError(
                "root cannot make a mount namespace here (unshare -m): run these tests as a plain user"
            )

    def enter(self, argv: Sequence[str], cwd: Path) -> list[str]:
        """The command as the user in the namespace. Each step ends in exec, so that a signal reaches the command."""
        user = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "--inh-caps=-all"]
        return ["nsenter", "-t", str(self.keeper.pid), "-m", "--", *user, "env", "-C", str(cwd), *argv]

    def close(self) -> None:
        """Let the namespace go; commands that still run keep it."""
        self.keeper.communicate(timeout=10)

    def _mounts(self) -> str:
        """Bash lines for the namespace: what to hide, what to bind back, and to stay."""
        needed = {ROOT, Path(sys.prefix), Path(sys.base_prefix).resolve(), self.folder}
        hidden: dict[Path, list[Path]] = {}
        for path in sorted(needed):
            closed = [above for above in reversed(path.parents) if not above.stat().st_mode & stat.S_IXOTH]
            if closed:
                hidden.setdefault(closed[0], []).append(path)
        lines = []
        for number, (ancestor, paths) in enumerate(hidden.items()):
            tree = self.folder / f"tree{number}"
            tree.mkdir()
            lines.append(f"mount -t tmpfs -o mode=755,size=1m tmpfs {shlex.quote(str(tree))}")
            for path in paths:
                inside = shlex.quote(str(tree / path.relative_to(ancestor)))
                lines.append(f"mkdir -p {inside}; mount --rbind {shlex.quote(str(path))} {inside}")
            lines.append(f"mount --rbind {shlex.quote(str(tree))} {shlex.quote(str(ancestor))}")
        return "\n".join([*lines, "echo ready", "exec cat"])
