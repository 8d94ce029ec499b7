"""Locks: one trainer per stage, and one launcher per run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from vjepa_scale.core.errors import UserError, reason_of
from vjepa_scale.core.files import file_lock
from vjepa_scale.core.installed import command

# Seconds that the ranks of a run that was just killed may take to end.
PATIENCE_S = 10.0

HELD = "another process is training this stage"


def stage_lock(stage_folder: Path, *, patience_s: float) -> AbstractContextManager[bool]:
    """Takes a stage's lock, as rank 0 does during training. Yields whether this process holds it."""
    return file_lock(stage_folder / ".lock", patience_s=patience_s)


def refuse_if_training(stage_folder: Path) -> None:
    """Raises UserError if a stage is being trained. Launchers call it before they change anything of it."""
    if (stage_folder / ".lock").exists():
        with stage_lock(stage_folder, patience_s=PATIENCE_S) as held:
            if not held:
                cancel = f"{command('launch')} cancel '{stage_folder.parent}'"
                raise UserError(HELD, where=stage_folder, fix=f"wait for it, or end it: {cancel}")


@contextmanager
def only_launcher_of(run_folder: Path) -> Iterator[None]:
    """Raises UserError while another process launches the same run, or runs it locally."""
    with ExitStack() as stack:
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(file_lock(run_folder / ".launch.lock"))
        except OSError as error:
            raise UserError(
                f"{run_folder} cannot be written: {reason_of(error)}",
                where="run.dir",
                fix="a folder on a file system that all nodes see",
            ) from None
        if not held:
            raise UserError(
                "another launch of this run is at work",
                where=run_folder,
                fix=f"{command('launch')} status '{run_folder}', or cancel instead of status",
            )
        yield
