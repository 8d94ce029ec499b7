"""What a page consists of: sections of tables, charts, pictures and text. page.html lays them out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vjepa_scale.report.charts import Chart


@dataclass(frozen=True)
class Strip:
    """A row of frames as one picture. pixelated: to be enlarged without smoothing"""

    label: str
    uri: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class Picture:
    """Rows that belong together, with a Markdown caption."""

    caption: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page. note: a few words below it; state: good, bad or empty, for its colour"""

    label: str
    value: str
    note: str = ""
    state: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain text. numbers: columns that are aligned to the right; code: columns of keys, commands or paths"""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()
    kind: str = "table"


@dataclass(frozen=True)
class Charts:
    """Charts in so many columns, where there is room: 1, 2 or 3."""

    charts: Sequence[Chart]
    columns: int = 1
    kind: str = "charts"


@dataclass(frozen=True)
class Pictures:
    pictures: Sequence[Picture]
    kind: str = "pictures"


@dataclass(frozen=True)
class Image:
    """One picture as a data URI. wide: over the whole width"""

    uri: str
    caption: str
    wide: bool = False
    kind: str = "image"


@dataclass(frozen=True)
class Text:
    """A paragraph of Markdown (code and links). remark: set smaller, for what is missing and why"""

    text: str
    remark: bool = False
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    """Text as it is. folded: shown after a click on its title"""

    title: str
    text: str
    folded: bool = False
    kind: str = "code"


@dataclass
class Section:
    """A part of the page. name: of its link"""

    name: str
    title: str
    blocks: list[Any] = field(default_factory=list)
