"""Reports: of one run, of several runs side by side, and of a recipe before it is launched."""

import time
from collections.abc import Sequence
from pathlib import Path

from vjepa_scale.monitor.states import clock
from vjepa_scale.report.page import write_page
from vjepa_scale.report.read import RunRecord, read_run
from vjepa_scale.report.run_page import run_sections, tiles


def write_run_report(folder: Path, out: Path, *, features: bool | None = None) -> None:
    """Writes the report of a run. Raises UserError if the folder has no readable recipe.

    features: draw patch features: yes, no, or None: unless the encoder is large for this machine
    """
    run = read_run(folder)
    write_page(
        out,
        title=run.name,
        subtitle=[_headline(run)],
        tiles=tiles(run),
        sections=run_sections(run, features=features),
        footer=_footer(),
    )


def _headline(run: RunRecord) -> str:
    model = run.recipe.model.encoder
    words = [f"encoder of width {model.width} and depth {model.depth}", f"seed {run.recipe.run.seed}"]
    if run.status.launched is not None:
        words.append(f"launched {clock(run.status.launched, 0)} on {run.status.cluster}")
    if run.status.commit:
        words.append(f"commit {run.status.commit[:10]}" + (" with local changes" if run.status.dirty else ""))
    return f"{run.folder}: " + ", ".join(words)


def _footer() -> str:
    return f"Written {time.strftime('%Y-%m-%d %H:%M %Z')} by vjepa_scale. This file is complete in itself: it loads nothing."
