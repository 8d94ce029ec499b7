"""The kernel's count of processes that it has ended for lack of memory."""

from pathlib import Path

import pytest

from vjepa_scale.launch.oom_kills import oom_kills


@pytest.mark.parametrize(
    ("groups", "file", "content", "count"),
    [
        ("0::/job_7/step_0\n", "job_7/step_0/memory.events", "low 0\noom 3\noom_kill 2\n", 2),
        ("0::/../elsewhere\n", "memory.events", "oom_kill 1\n", 1),  # a container sees its own group as the mount
        ("5:cpu,memory:/slurm/job_7\n", "memory/slurm/job_7/memory.oom_control", "under_oom 0\noom_kill 4\n", 4),
        ("0::/\n", "memory.other", "oom_kill 1\n", 0),
        ("", "memory.events", "oom_kill 1\n", 0),
    ],
)
def test_the_kernels_counter_of_kills(groups: str, file: str, content: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(groups)
    path = tmp_path / "mount" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert oom_kills(tmp_path / "cgroup", tmp_path / "mount") == count
    assert oom_kills(tmp_path / "none", tmp_path / "mount") == 0
