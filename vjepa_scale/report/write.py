"""Writes reports: of one run, of several runs side by side, and of a recipe before it is launched.

A report is one HTML file with its styles, its script, Plotly and all pictures in it. No request leaves it.
"""

import html
import re
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import write_atomic
from vjepa_scale.monitor.states import clock
from vjepa_scale.report.blocks import Section, Tile
from vjepa_scale.report.read import RunRecord, read_run


def write_run_report(folder: Path, out: Path, *, features: bool | None = None) -> None:
    """Writes the report of a run. Raises UserError if the folder has no readable recipe.

    features: draw patch features: yes, no, or None: unless the encoder is large for this machine
    """
    from vjepa_scale.report.run_page import run_sections
    from vjepa_scale.report.stages import tiles

    run = read_run(folder)
    _write(out, run.name, [_headline(run)], tiles(run), run_sections(run, features=features))


def write_comparison(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of several runs. Raises UserError if a folder has no readable recipe, or comes twice."""
    from vjepa_scale.report.compare import comparison, named_apart

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is given twice", where="command line", fix="give each run once")
    runs = named_apart([read_run(folder) for folder in folders])
    names = ", ".join(run.name for run in runs[:6]) + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")
    _write(out, f"{len(runs)} runs", [names], [], comparison(runs))


def write_preview(given: str, overrides: Sequence[str], out: Path) -> None:
    """Writes the preview of a recipe. given: a YAML file, or the name of a shipped recipe

    Raises UserError for a recipe that is not valid or cannot be planned.
    """
    from vjepa_scale.recipe.load import recipe_file
    from vjepa_scale.report.preview import preview_sections
    from vjepa_scale.training.planned_start import load_for_training

    path = recipe_file(given)
    recipe = load_for_training(path, overrides)
    subtitle = " ".join([f"Preview of {path}", *overrides])
    _write(out, path.stem, [subtitle, "Nothing is trained yet."], [], preview_sections(recipe, source=path))


def _write(out: Path, title: str, subtitle: Sequence[str], tiles: Sequence[Tile], sections: Sequence[Section]) -> None:
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    footer = f"Written {written} by vjepa_scale. This file loads nothing: it can be sent and kept as it is."
    write_page(out, title=title, subtitle=subtitle, tiles=tiles, sections=sections, footer=footer)


def _headline(run: RunRecord) -> str:
    model = run.recipe.model.encoder
    words = [f"encoder of width {model.width} and depth {model.depth}", f"seed {run.recipe.run.seed}"]
    if run.status.launched is not None:
        words.append(f"launched {clock(run.status.launched, 0)} on {run.status.cluster}")
    if run.status.commit:
        words.append(f"commit {run.status.commit[:10]}" + (" with local changes" if run.status.dirty else ""))
    return f"{run.folder}: " + ", ".join(words)


# -- the file ----------------------------------------------------------------------------------------


def write_page(
    path: Path, *, title: str, subtitle: Sequence[str], tiles: Sequence[Tile], sections: Sequence[Section], footer: str
) -> None:
    """Writes the file. Every text is escaped; captions may have Markdown's code, bold and links."""
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = lambda text: Markup(prose(text))
    template = environment.from_string(_file("page.html"))
    content = template.render(
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        sections=[section for section in sections if section.blocks],
        footer=footer,
        css=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        plotly=Markup(get_plotlyjs()),
    )
    write_atomic(path, content)


def prose(text: str) -> str:
    """Returns a line of Markdown as HTML: `code`, **bold**; of a link its text, since the page may be anywhere."""
    out = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    out = html.escape(out, quote=False)
    out = re.sub(r"`([^`]+)`", r"<code>\1</code>", out)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", out)


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text()
