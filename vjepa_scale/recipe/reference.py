"""Every key of a recipe as a Markdown table, from the schema itself: docs/recipe_keys.md.

python -m vjepa_scale.recipe.reference > docs/recipe_keys.md
"""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vjepa_scale.recipe.schema import Recipe


def reference() -> str:
    """The whole page."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made from the schema by `python -m vjepa_scale.recipe.reference`. `<stage>` is `pretrain` or `cooldown`.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    seen: set[str] = set()
    for key, default, meaning in _rows(Recipe, ""):
        key = key.replace("pretrain", "<stage>", 1).replace("cooldown", "<stage>", 1)
        if key not in seen:
            seen.add(key)
            lines.append(f"| `{key}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        for one, suffix in inner:
            yield from _rows(one, f"{prefix}{name}{suffix}.")
        if not inner:
            yield f"{prefix}{name}", _default(field), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    return "" if field.default is None else f"`{field.default}`"


def _sections(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """The sections inside an annotation, and what stands between the key and their fields: .NAME or .N."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    kind = getattr(annotation, "__origin__", None)
    here = ".NAME" if kind is dict else ".N" if kind is tuple else ""
    return [(found, here + suffix) for inner in get_args(annotation) for found, suffix in _sections(inner)]


if __name__ == "__main__":
    print(reference(), end="")
