"""Generates docs/recipe_keys.md, a Markdown table of every key of a recipe, from the schema.

python -m vjepa_scale.recipe.reference > docs/recipe_keys.md
"""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vjepa_scale.recipe.mask_sections import MaskSection, section_of_kind
from vjepa_scale.recipe.registry import DEFAULT_KINDS, MASK_GENERATORS, STAGES, class_of
from vjepa_scale.recipe.schema import Recipe
from vjepa_scale.recipe.stage_sections import StageConfig


def reference() -> str:
    """Returns the whole page."""
    lines = [
        "# Every key of a recipe",
        "",
        "Generated from the schema by `python -m vjepa_scale.recipe.reference`. `<stage>` is `pretrain`, `cooldown`, "
        "`action` or `probe`, or another name with a `kind`. Rows of `action` and `probe` list only keys that the "
        "other stages do not have, or that have another default.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    seen: dict[str, tuple[str, str]] = {}
    for key, default, meaning in _rows(Recipe, ""):
        stage, dot, rest = key.partition(".")
        general = f"<stage>{dot}{rest}" if stage in DEFAULT_KINDS else key
        if stage in DEFAULT_KINDS and class_of(STAGES, DEFAULT_KINDS[stage]).section is not StageConfig:
            known = seen.get(general) == (default, meaning)
        else:
            known, key = general in seen, general
        seen.setdefault(general, (default, meaning))
        if not known:
            lines.append(f"| `{key}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _rows(section: type[BaseModel], prefix: str, default: Any = None) -> Iterator[tuple[str, str, str]]:
    """default: an instance of the section, whose values are the defaults here"""
    for name, field in section.model_fields.items():
        if (section, name) == (Recipe, "others"):  # their kinds are listed already
            continue
        own = field.default if default is None else getattr(default, name)
        # A section with its own description repeats another one.
        inner = [] if field.description else _sections(field.annotation)
        for one, suffix in inner:
            yield from _rows(one, f"{prefix}{name}{suffix}.", own if isinstance(own, one) else None)
        if not inner:
            yield f"{prefix}{name}", _default(field, own), field.description or ""


def _default(field: FieldInfo, value: Any) -> str:
    if field.is_required():
        return "(required)"
    return "" if value is None else f"`{value}`"


def _sections(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """Returns the sections inside an annotation, each with the text between its key and its fields: .NAME or .N."""
    if annotation is MaskSection:
        return [(section_of_kind(kind), "") for kind in MASK_GENERATORS]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    kind = getattr(annotation, "__origin__", None)
    here = ".NAME" if kind is dict else ".N" if kind is tuple else ""
    return [(found, here + suffix) for inner in get_args(annotation) for found, suffix in _sections(inner)]


if __name__ == "__main__":
    print(reference(), end="")
