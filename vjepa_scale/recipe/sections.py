"""The base class and the types of values of all sections of a recipe."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
# Sizes of networks. The limits are far above any trained network: a typing error, or a file with absurd sizes, is an
# error here and does not build a network for hours.
Blocks = Annotated[int, Field(gt=0, le=1024, strict=True)]
Channels = Annotated[int, Field(gt=0, le=2**20, strict=True)]
Hidden = Annotated[int, Field(gt=0, le=2**22, strict=True)]
Side = Annotated[int, Field(gt=0, le=1024, strict=True)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_range(value: Any) -> Any:
    return (value, value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"a range is from low to high, not {value[0]} to {value[1]}")
    return value


# A single number stands for a range of that one value.
Positive = Annotated[float, Field(gt=0)]
PositiveRange = Annotated[tuple[Positive, Positive], BeforeValidator(_as_range), AfterValidator(_ordered)]
ShareRange = Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_range), AfterValidator(_ordered)]
# Height and width; a single number stands for a square.
Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(lambda v: [v, v] if isinstance(v, int) else v)]
