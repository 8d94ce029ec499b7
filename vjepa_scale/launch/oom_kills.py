"""Counts the processes that the kernel has ended for lack of memory, in this process's control group.

Does not import PyTorch.
"""

from pathlib import Path

_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def oom_kills(groups: Path = _GROUPS, mount: Path = _MOUNT) -> int:
    """Returns the kernel's counter; 0 where it has none. A job's own group has it under Slurm and in containers."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return 0
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            files += [mount / path.lstrip("/") / "memory.events", mount / "memory.events"]
        elif "memory" in controllers.split(","):
            files += [mount / "memory" / path.lstrip("/") / "memory.oom_control", mount / "memory/memory.oom_control"]
    return next((count for file in files if (count := _count(file)) is not None), 0)


def _count(file: Path) -> int | None:
    try:
        words = dict(line.split(maxsplit=1) for line in file.read_text().splitlines())
        return int(words["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None
