"""What stands on the pages of docs/, for tests that run it."""

import re

from tests.chain import ROOT


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, by the language behind their three backticks ("" where there is none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [text for named, text in found if named == language]


def file_on(page: str, name: str) -> str:
    """The content that a page gives for a file: the block below a line that ends with its name and a colon."""
    text = (ROOT / page).read_text()
    found = re.findall(rf"`{re.escape(name)}`:\n\n```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{page} gives {name} {len(found)} times"
    return str(found[0])


def registry_line(page: str, mapping: str, kind: str) -> str:
    """The line that a page adds to a mapping of recipe/registry.py for a kind."""
    text = (ROOT / page).read_text()
    (line,) = re.findall(rf'^(    "{kind}": "vjepa_scale\.[\w.:]+",) +# {mapping}$', text, re.MULTILINE)
    return f"{line}\n"
