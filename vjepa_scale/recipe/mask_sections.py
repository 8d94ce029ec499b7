"""The ``masks`` section of a recipe (docs/method.md 4). masking/ has each generator's own keys."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from vjepa_scale.recipe.registry import MASK_GENERATORS, class_of
from vjepa_scale.recipe.sections import PositiveInt, Section


class MaskSection(Section):
    """An entry of ``masks.generators``. The section of a kind has ``kind: Literal["NAME"]`` and its own keys."""

    kind: str


def section_of_kind(kind: str) -> type[MaskSection]:
    """Returns the section class of a registered kind of mask generator."""
    found: type[MaskSection] = class_of(MASK_GENERATORS, kind).section
    return found


def _of_its_kind(value: Any) -> Any:
    """Parses a generator as the section of its kind. (pydantic's tagged union would add the kind to errors' keys.)"""
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a mask generator is a section of keys, not {value!r}")
    kind = value.get("kind", "blocks")
    if not isinstance(kind, str) or kind not in MASK_GENERATORS:
        raise ValueError(f"no kind of masks {kind!r}; there are {', '.join(MASK_GENERATORS)}")
    section = section_of_kind(kind)
    known = list(section.model_fields)
    for key in value:
        if key not in known:
            others = [other for other in MASK_GENERATORS if key in section_of_kind(other).model_fields]
            where = f"; it is one of {' and '.join(others)}" if others else ""
            raise ValueError(f"{key!r} is no key of masks of kind {kind}, which have {', '.join(known)}{where}")
    return section.model_validate(value)


def _published() -> tuple[MaskSection, ...]:
    """The paper's short-range and long-range masks."""
    blocks = section_of_kind("blocks")
    return (
        blocks.model_validate({"blocks": 8, "spatial_scale": 0.15}),
        blocks.model_validate({"blocks": 2, "spatial_scale": 0.7}),
    )


class MasksConfig(Section):
    # A default factory, because the modules of the sections import this one.
    generators: tuple[Annotated[SerializeAsAny[MaskSection], BeforeValidator(_of_its_kind)], ...] = Field(
        default_factory=_published, min_length=1
    )
    group: PositiveInt = Field(24, description="consecutive slots of the global batch that share one token count")
    truncate: Literal["random", "tail"] = Field(
        "random", description="how lists are cut to that count: a random subset, or dropping the latest (published)"
    )
    multiple_of: PositiveInt = Field(
        1,
        description="of blocks: token counts are rounded down to a multiple of this (smaller counts stay), so that "
        "fewer lengths occur; not with a complement",
    )

    @model_validator(mode="after")
    def _go_together(self) -> "MasksConfig":
        for number, entry in enumerate(self.generators):
            class_of(MASK_GENERATORS, entry.kind).check_recipe(entry, self, number)
        return self
