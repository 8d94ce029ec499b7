"""What make_shards tells: progress in a log, and the closing summary."""

from pathlib import Path

import pytest

from vjepa_scale.commands import shards as tool
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.make import Summary, summarize


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_log_has_a_line_now_and_then_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(tool, "time", clock)
    watch = tool.Watch()
    for done in range(1, 101):  # two a second
        watch("probing", done, 1000)
        clock.now += 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["probing: 61 of 1000, 2.0 a second, 8 minutes left"]  # 939 / 2 s


def test_the_rate_does_not_count_what_an_earlier_run_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(tool, "time", clock)
    watch = tool.Watch()
    for done in range(9001, 9101):
        watch("writing", done, 10_000)
        clock.now += 1.0
    assert capsys.readouterr().out.splitlines()[-1] == "writing: 9091 of 10000, 1.0 a second, 15 minutes left"


def test_the_closing_summary(capsys: pytest.CaptureFixture[str]) -> None:
    summary = Summary(
        clips=1203,
        shards=3,
        hours=2.5,
        bytes=780_400_000,
        resolutions={(1920, 1080): 1000, (340, 256): 203},
        rates={30.0: 700, 29.97: 500, 0.0: 3},
        rejected={"duplicate": 12, "too short": 1},
    )
    tool.report(Path("out"), summary)
    assert capsys.readouterr().out.splitlines() == [
        "out: 1203 clips, 2.50 h, 780.4 MB in 3 shards written",
        "resolutions: 1920x1080 (1000), 340x256 (203)",
        "frames a second: 30 (700), 29.97 (500), still (3)",
        "rejected: 13 (see out/rejected.jsonl)",
        "      12  duplicate",
        "       1  too short",
    ]


@pytest.mark.parametrize(
    ("classes", "unlabelled", "line"),
    [
        (0, 5, "classes: 0; 5 clips without a label"),
        (3, 0, "classes: 3"),
        (3, 1, "classes: 3; 1 clip without a label"),
    ],
)
def test_clips_without_a_label_are_counted(
    classes: int, unlabelled: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.report(Path("out"), Summary(5, 1, 0.1, 1000, {}, {}, {}, classes=classes, unlabelled=unlabelled))
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("hours", "told"), [(1.0, "1.00 h"), (0.06, "3.6 min"), (0.0166, "59.8 s"), (0.0, "0.0 s"), (123.456, "123.46 h")]
)
def test_short_and_few_are_told_so(hours: float, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    tool.report(Path("out"), Summary(1, 1, hours, 2_000_000, {}, {}, {}))
    assert capsys.readouterr().out.splitlines()[0] == f"out: 1 clip, {told}, 2.0 MB in 1 shard written"


def test_classes_are_named_with_their_clips(shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    tool.report(shards.folder, summarize(shards.folder))
    assert "classes: 2: up (5), down/deep (3); 1 clip without a label" in capsys.readouterr().out.splitlines()
