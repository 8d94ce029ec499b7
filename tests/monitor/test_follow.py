"""Following a run to its end, and copying the lines of its logs."""

import subprocess
from pathlib import Path

import pytest

from tests.monitor.run_by_hand import Run, as_launcher, plan_both
from vjepa_scale.core.files import GrowingFile
from vjepa_scale.monitor import follow as follow_module
from vjepa_scale.monitor.follow import follow, show_lines
from vjepa_scale.monitor.jobs import (
    this_process,
)


def test_lines_are_shown_whole_and_once(tmp_path: Path) -> None:
    said: list[str] = []
    log = GrowingFile(tmp_path / "log")
    show_lines(log, whole_lines=True, stream=said.append)  # there is none yet
    log.path.write_bytes("submitit INFO\nstep é 1\nwarning: x\nstep".encode())
    show_lines(log, whole_lines=True, stream=said.append)
    assert said == ["step é 1", "warning: x"]
    show_lines(log, whole_lines=False, stream=said.append)
    assert said[2:] == ["step"]
    assert log.position == log.path.stat().st_size
    said.clear()
    show_lines(GrowingFile(log.path), whole_lines=False, only="warning: ", stream=said.append)
    assert said == ["warning: x"]


def test_a_line_that_could_not_be_shown_is_shown_later_and_those_before_it_not_again(tmp_path: Path) -> None:
    said: list[str] = []

    def full_at_two(line: str) -> None:
        if line == "two" and len(said) == 1:
            said.append("no space")
            raise OSError(28, "No space left on device")
        said.append(line)

    log = GrowingFile(tmp_path / "log")
    log.path.write_text("one\ntwo\nthree\n")
    with pytest.raises(OSError, match="No space"):
        show_lines(log, whole_lines=True, stream=full_at_two)
    show_lines(log, whole_lines=True, stream=full_at_two)
    assert said == ["one", "no space", "two", "three"]


STAMP = "2026-11-29 17:00:00.123"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGS_EVERY_S", "STATUS_EVERY_S", "SURE_AFTER_S"):
        monkeypatch.setattr(follow_module, name, 0.02)


@pytest.mark.usefixtures("hasty")
def test_follow_to_the_end(run: Run) -> None:
    plan_both(run)
    run.submit("pretrain", cluster="local", **this_process())
    log = run.folder / "pretrain" / "logs" / "100_0_log.out"
    log.parent.mkdir()
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    run.start("pretrain")
    said: list[str] = []

    def go_on(text: str) -> None:
        """The run moves on whenever its follower has said something."""
        said.append(text)
        if text.startswith("pretrain: running"):
            log.write_text(
                log.read_text() + f"{STAMP} debug [pretrain rank 0] noise\n{STAMP} info [pretrain rank 0] step 12\n"
            )
            log.with_suffix(".err").write_text(
                f"noise\n{STAMP} warning [pretrain rank 0, a_library] noise\n{STAMP} warning [pretrain rank 0] slow\n"
            )
        elif text == "step 12":
            run.finish("pretrain")
        elif text.startswith("cooldown: waiting"):
            run.submit("cooldown", job="101", cluster="local", **this_process())
        elif text.startswith("cooldown: starting"):
            new = run.folder / "cooldown" / "logs" / "101_0_log.out"
            new.parent.mkdir(exist_ok=True)
            new.write_text("submitit INFO\nstep 18\n")
        elif text == "step 18":
            run.finish("cooldown")

    assert follow(run.folder, stream=go_on) == 0
    assert said[:10] == [f"line {number}" for number in range(90, 100)]
    order = ["pretrain: running", "warning: slow", "step 12", "pretrain: done"]
    order += ["cooldown: waiting for pretrain", "cooldown: starting", "step 18", "cooldown: done"]
    assert [text for text in said[10:] if text in order] == order
    assert not any("submitit" in text or "noise" in text for text in said)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("user_error", "code"), [(True, 2), (False, 1)])
def test_follow_a_failure(
    run: Run, user_error: bool, code: int, sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    plan_both(run)
    run.submit("pretrain", cluster="local", **as_launcher(sleeper))
    run.start("pretrain")
    run.fail("pretrain", user_error=user_error)
    sleeper.kill()
    sleeper.wait()
    said: list[str] = []
    assert follow(run.folder, stream=said.append) == code
    error = capsys.readouterr().err
    assert error.startswith("error: pretrain: rank 1: ValueError at step 7: a bad; log ")
    assert error.count("\n") == 1
    assert "cooldown: cancelled (because pretrain did not finish)" in said


@pytest.mark.usefixtures("hasty")
def test_follow_a_failure_after_which_another_attempt_comes(run: Run) -> None:
    """Its reason is said once; the one of before the watching began is not."""
    plan_both(run)
    run.submit("pretrain", cluster="local", **this_process())
    run.start("pretrain")
    run.fail("pretrain", message="of long ago")
    run.add("pretrain", "requeued", job_id="100", reason="x")
    run.start("pretrain", restart=1)
    said: list[str] = []

    def go_on(text: str) -> None:
        said.append(text)
        if text.startswith("pretrain: running"):
            run.fail("pretrain", restart=1, ago=-1000, message="rank 1 (node h, pid 5) ended by SIGKILL", kind="Killed")
            run.add("pretrain", "requeued", ago=-1000, job_id="100", reason="x")
        elif text.startswith("pretrain: an attempt failed"):
            run.start("pretrain", restart=2)
            run.finish("pretrain")
            run.submit("cooldown", job="101", cluster="local", **this_process())
            run.finish("cooldown")

    assert follow(run.folder, stream=go_on) == 0
    failed = "pretrain: an attempt failed: Killed at step 7: rank 1 (node h, pid 5) ended by SIGKILL"
    assert said.count(failed) == 1
    assert not any("long ago" in text for text in said)


@pytest.mark.usefixtures("hasty")
def test_leaving_is_not_ending(run: Run) -> None:
    run.submit("pretrain", cluster="local", **this_process())
    said: list[str] = []

    def leave(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise KeyboardInterrupt

    assert follow(run.folder, stream=leave) == 130
    assert "no longer following" in said[-1]
    assert "cancelled" not in (run.folder / "pretrain" / "history.jsonl").read_text()
