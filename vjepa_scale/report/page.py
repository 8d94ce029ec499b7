"""Writes a page: one HTML file with its styles, its script, Plotly and all pictures in it. No request leaves it."""

import html
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from vjepa_scale.core.files import write_atomic
from vjepa_scale.report.blocks import Section, Tile


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
