"""A disk that is full: one line that names the file, nothing half written, and last words that are written anyway.

The system's limit on the size of a file stands in for a full disk: a write past it takes a part, and then fails.
"""

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.chain import launch, tool, write_recipe
from tests.processes import run_processes
from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.formats import published
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig, WeightSource
from vjepa_scale.checkpoint.safetensors_writer import write_safetensors
from vjepa_scale.checkpoint.saver import Saver
from vjepa_scale.core import files
from vjepa_scale.core.errors import FULL, PassingError, UserError, exit_code
from vjepa_scale.core.files import append_jsonl, keep_reserve, read_json, read_jsonl, write_atomic, write_json
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.manifest import write_manifest
from vjepa_scale.launch import worker
from vjepa_scale.launch.local import LocalChain
from vjepa_scale.launch.record import Launch, record_launch
from vjepa_scale.launch.retry_policy import Verdict
from vjepa_scale.launch.snapshot import snapshot_code
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.recipe.schema import ModelConfig
from vjepa_scale.run.events import History

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WEIGHTS = {"w": torch.ones(5000)}
MODEL = ModelConfig.model_validate(
    {"encoder": {"width": 24, "depth": 1, "heads": 2}, "predictor": {"width": 12, "depth": 1, "heads": 2}, "patch": 8}
)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _write_published(folder: Path) -> None:
    tensors = {f"encoder.{name}": t for name, t in Encoder(MODEL).state_dict().items()}
    tensors |= {f"predictor.{name}": t for name, t in Predictor(MODEL).state_dict().items()}
    config = ConsolidatedConfig(model=MODEL, mean=(0, 0, 0), std=(1, 1, 1), frames=4, size=(16, 16), fps=4)
    entries = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    published.write_published(folder, WeightSource(folder, config, entries, tensors.__getitem__))


# Everything that a run or an export writes, by the function that writes it.
WRITERS: dict[str, Callable[[Path], object]] = {
    "write_atomic": lambda folder: write_atomic(folder / "a", "x" * 20_000),
    "write_json": lambda folder: write_json(folder / "a.json", ["x" * 20_000]),
    "keep_reserve": keep_reserve,
    "write_safetensors": lambda folder: write_safetensors(
        folder / "a.safetensors", [("w", (5000,), torch.float32)], WEIGHTS.__getitem__
    ),
    "store.save": lambda folder: store.save(folder, 1, WEIGHTS, {}),
    "store.save, its manifest": lambda folder: store.save(folder, 1, {"w": torch.ones(1)}, {"text": "x" * 20_000}),
    "snapshot_code": snapshot_code,
    "a data set's manifest": lambda folder: write_manifest(
        folder, shards=[], classes=[], columns={"key": np.zeros(5000)}, source={}
    ),
}


@pytest.mark.fault(
    "disks",
    "the run folder's disk is full, for any file that a run or an export writes",
    "an error that names the file; nothing half written",
)
@pytest.mark.parametrize("name", WRITERS)
def test_the_error_names_the_file_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    with no_file_larger_than(10_000), pytest.raises(OSError, match="File too large") as raised:
        WRITERS[name](tmp_path)
    assert raised.value.errno in FULL
    assert Path(raised.value.filename).is_relative_to(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_export_names_its_file(tmp_path: Path) -> None:
    """PyTorch's writer hides the system's error behind one of its own. (The caller removes the folder.)"""
    with no_file_larger_than(10_000), pytest.raises(OSError, match="File too large") as raised:
        _write_published(tmp_path)
    assert raised.value.filename == str(tmp_path / "model.pt")


@pytest.mark.fault(
    "disks",
    "the disk is full while a row of a log is written",
    "the row is whole or absent",
)
def test_a_row_is_written_whole_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append_jsonl(path, {"row": 1})
    with no_file_larger_than(path.stat().st_size + 5), pytest.raises(OSError, match="File too large") as raised:
        append_jsonl(path, {"row": 2, "text": "x" * 50})
    assert raised.value.filename == str(path)
    append_jsonl(path, {"row": 3})
    assert list(read_jsonl(path)) == [{"row": 1}, {"row": 3}]


@pytest.mark.fault(
    "disks",
    "the disk is full while shards are made",
    "exit code 2, one line; no manifest, so the shards cannot be trained on; the same command goes on",
)
def test_make_shards_on_a_full_disk_is_one_line(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    videos, out = two_data_sets["left"].parent / "left", tmp_path / "out"
    with no_file_larger_than(1000):
        done = tool("make_shards", videos, out, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/")
    assert done.stderr.endswith(": File too large\n")
    assert done.stderr.count("\n") == 1
    assert not (out / "manifest.json").exists()  # with space there, the same command goes on


def _one_rank_fails(ranks: Ranks, folder: str) -> str:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    if ranks.rank == 1:
        store.write_chunk_checksums = full  # type: ignore[assignment]
    saver = Saver(Path(folder), background=True)
    saver.save(1, {"w": torch.ones(3)}, {})
    with pytest.raises(PassingError, match="step 1 cannot be written: No space left") as raised:
        saver.take(wait=True)
    return str(raised.value)


@pytest.mark.fault(
    "disks",
    "one rank of several finds the disk full in a save",
    "the same error on all ranks, nothing partial is left",
)
@pytest.mark.distributed
def test_what_one_rank_cannot_write_is_an_error_on_all(tmp_path: Path) -> None:
    assert len(set(run_processes(_one_rank_fails, 2, str(tmp_path)))) == 1
    assert list(tmp_path.iterdir()) == []


def test_commands_end_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(*arguments: Any) -> Callable[[], int]:
        def command() -> int:
            raise OSError(*arguments)

        return command

    assert exit_code(failing(errno.ENOSPC, "No space left on device", "runs/a")) == 2
    assert exit_code(failing(errno.ENOSPC, "No space left on device")) == 2  # e.g. of a log
    assert capsys.readouterr().err == (
        "error: runs/a: No space left on device\nerror: a file cannot be written: No space left on device\n"
    )
    assert exit_code(failing(errno.EIO, "Input/output error")) == 2  # of a read: the system gives no path
    assert capsys.readouterr().err == "error: the system refused a read or write: Input/output error\n"


@pytest.mark.fault(
    "disks",
    "the disk is full at a launch",
    "exit code 2, one line, nothing started",
)
def test_a_launch_that_finds_the_disk_full_is_one_line(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    for limit in (10_000, 100_000):  # no room for a file of the code; for what a stage's last words need
        with no_file_larger_than(limit):
            done = launch(recipe, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {tmp_path / 'run'}/")
        assert done.stderr.endswith(": File too large\n")
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("run/*/history.jsonl"))  # nothing was launched


def test_a_launch_that_cannot_be_written_down_leaves_no_folder(
    two_data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets))
    monkeypatch.setattr("vjepa_scale.launch.record.snapshot_code", lambda run: run)
    with no_file_larger_than(500), pytest.raises(OSError, match="File too large"):
        record_launch([stages_of(recipe)["pretrain"]], cluster="local")
    assert list((tmp_path / "run" / "launches").iterdir()) == []


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stage's folder on a disk that is full as long as its reserve is kept."""
    folder = tmp_path / "run" / "pretrain"
    folder.mkdir(parents=True)
    keep_reserve(folder)
    for name in ("write_json", "append_jsonl"):
        real = getattr(files, name)

        def write(path: Path, *values: Any, real: Callable[..., None] = real, **words: Any) -> None:
            if (folder / ".reserve").exists():
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            real(path, *values, **words)

        for room in ("run.events", "run.failures"):
            monkeypatch.setattr(f"vjepa_scale.{room}.{name}", write, raising=False)
    return folder


def test_last_words_are_written_in_the_reserve(disk: Path) -> None:
    History(disk).add("gave_up", reason="the disk is full")
    assert [row["reason"] for row in History(disk).rows()] == ["the disk is full"]
    keep_reserve(disk)  # there is space again
    assert (disk / ".reserve").stat().st_size == 256 * 1024


@pytest.mark.fault(
    "disks",
    "the disk is full in a step",
    "the failure is reported in a reserve of 256 KiB; another attempt follows, and after it exit code 2 and one line",
)
def test_a_rank_that_finds_the_disk_full_reports_it(
    disk: Path, two_data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets))

    def train_stage(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(disk / "metrics.jsonl"))

    left: list[int] = []
    monkeypatch.setattr("vjepa_scale.training.trainer.train_stage", train_stage)
    monkeypatch.setattr(worker, "Interrupt", lambda: SimpleNamespace(listen=lambda **_: None, signal=None))
    monkeypatch.setattr(worker.atexit, "register", lambda _, code: left.append(code))
    with pytest.raises(OSError, match="No space left"):
        worker.run_stage(stages_of(recipe)["pretrain"])
    assert left == [2]
    report = read_json(next((disk / "failures").iterdir()))
    assert (report["kind"], report["user_error"]) == ("PassingError", False)  # the next attempt may find space
    assert report["message"].startswith(f"{disk / 'metrics.jsonl'}: cannot be written: No space left on device (")

    # When it does not pass, the launcher ends with 2 and that line.
    History(disk).add("failed", **report, report=None)
    chain = LocalChain(Launch(tmp_path, tmp_path))
    failure = chain._failure(stages_of(recipe)["pretrain"], Verdict("stop", "it failed", "twice"), History(disk))
    assert isinstance(failure, UserError)
    assert str(failure) == report["message"]


def test_a_report_that_cannot_be_written_does_not_hide_the_error(
    two_data_sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets))

    def train_stage(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in a step")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    monkeypatch.setattr("vjepa_scale.training.trainer.train_stage", train_stage)
    monkeypatch.setattr("vjepa_scale.run.failures.write_json", full)
    monkeypatch.setattr(worker, "Interrupt", lambda: SimpleNamespace(listen=lambda **_: None, signal=None))
    monkeypatch.setattr(worker.atexit, "register", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        worker.run_stage(stages_of(recipe)["pretrain"])
    assert "in a step; its report cannot be written: " in capsys.readouterr().err
