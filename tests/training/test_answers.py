"""What a rank answers its supervisor: whether its main thread waits in a collective, and with which stacks."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from tests.processes import LIMIT_S
from vjepa_scale.run.progress import Page, Progress
from vjepa_scale.training import answers
from vjepa_scale.training.answers import answering, is_in_a_collective

SITE = "/env/lib/python3.11/site-packages"
C10D = f"{SITE}/torch/distributed/distributed_c10d.py"
OURS = "/repo/vjepa_scale"


def frames(*innermost_first: str) -> Any:
    frame = None
    for name in reversed(innermost_first):
        frame = SimpleNamespace(f_code=SimpleNamespace(co_filename=name), f_back=frame)
    return frame


@pytest.mark.parametrize(
    ("files", "waits"),
    [
        ([C10D, f"{OURS}/distributed/engine.py", f"{OURS}/training/step.py"], True),
        ([f"{SITE}/torch/_ops.py", f"{SITE}/torch/distributed/_functional_collectives.py", "a.py"], True),
        ([f"{SITE}/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py", f"{OURS}/model/blocks.py"], True),
        ([f"{SITE}/deepspeed/comm/torch.py", "a.py"], True),
        ([f"{OURS}/distributed/process_group.py", f"{OURS}/training/trainer.py"], True),
        ([f"{OURS}/model/blocks.py", f"{OURS}/objective/jepa.py"], False),
        # Code that computes, or writes, below a folder of that name.
        ([f"{OURS}/model/blocks.py", f"{SITE}/torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py"], False),
        ([f"{SITE}/torch/distributed/checkpoint/filesystem.py", f"{OURS}/checkpoint/saver.py"], False),
        ([C10D, f"{SITE}/torch/distributed/checkpoint/utils.py", f"{OURS}/checkpoint/saver.py"], True),
        # Its first calls, far below.
        ([f"{OURS}/model/blocks.py"] * 9 + [f"{SITE}/torch/distributed/run.py"], False),
        ([], False),
    ],
)
def test_where_a_thread_waits(files: Sequence[str], waits: bool) -> None:
    assert is_in_a_collective(frames(*files)) is waits


@pytest.mark.parametrize(("part", "waits"), [("reduce", 1), ("forward", 0)])
def test_a_rank_answers_each_question_once_and_writes_its_stacks(part: str, waits: int, tmp_path: Path) -> None:
    page = Page(step=-1)
    progress = Progress(page=page)
    progress.begin(7, first=False)
    progress.enter(part)
    with answering(page, folder=tmp_path, rank=3):
        path = tmp_path / "stacks" / "hung_step_7_rank_3.txt"
        for question in (1, 2):
            page.asked = question
            deadline = time.monotonic() + LIMIT_S
            while page.answered != question or not path.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert page.waits == waits
    assert "test_a_rank_answers_each_question_once" in path.read_text()
    assert not any(thread.name == "answers" for thread in threading.enumerate())


def test_the_ranks_own_stacks_are_on_disk_before_its_workers_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that does not go on is killed soon after it was asked."""
    path = tmp_path / "stacks" / "hung_step_7_rank_3.txt"
    seen: list[str] = []

    def workers(file: BinaryIO) -> None:
        seen.append(path.read_text())
        file.write(b"of a worker")

    monkeypatch.setattr(answers, "write_worker_stacks", workers)
    page = Page(step=7, asked=1)
    with answering(page, folder=tmp_path, rank=3):
        deadline = time.monotonic() + LIMIT_S
        while not seen:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "in test_the_ranks_own_stacks_are_on_disk" in seen[0]
    assert path.read_text() == seen[0] + "of a worker"
