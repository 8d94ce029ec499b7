"""What a recipe may say of masks (docs/method.md 4)."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vjepa_scale.recipe.sections import Fraction, PositiveInt, PositiveRange, Section, ShareRange


class BlockMasksConfig(Section):
    """Multi-block masking (docs/method.md 4): targets are the union of blocks, context is the rest."""

    kind: Literal["blocks"] = Field(
        "blocks",
        description="blocks: blocks of tokens are predicted. Or whole time steps (of model.tubelet frames): future: "
        "the rest of the clip from its first part; frame_dropout: steps anywhere from the others; multi_rate: the "
        "steps 1, 2, 4 … after the first part from it. A kind has the keys that name it below, blocks all others",
    )
    blocks: PositiveInt = Field(description="how many blocks; targets are their union")
    spatial_scale: ShareRange = Field(description="share of the h×w grid that one block covers")
    temporal_scale: ShareRange = Field((1.0, 1.0), description="share of time that one block covers")
    aspect_ratio: PositiveRange = Field((0.75, 1.5), description="height over width of a block")
    max_context_frames: Fraction = Field(1.0, description="share of time the context may come from, from the start")
    max_keep: PositiveInt | None = Field(None, description="at most this many context tokens")
    full_complement: bool = Field(False, description="targets are all tokens outside the (truncated) context")
    pred_full_complement: bool = Field(False, description="context is all tokens outside the (truncated) targets")
    invert: bool = Field(False, description="swap context and targets")

    @model_validator(mode="after")
    def _one_complement(self) -> "BlockMasksConfig":
        if self.pred_full_complement and (self.full_complement or self.max_keep is not None):
            raise ValueError("pred_full_complement decides the context: no full_complement or max_keep beside it")
        return self


_CONTEXT_SHARE = Field(
    (0.5, 0.5),
    description="future, multi_rate: share of time that is context, from the start; of a range, drawn per step",
)


class FutureMasksConfig(Section):
    """The first part of a clip predicts the rest."""

    kind: Literal["future"]
    context_share: ShareRange = _CONTEXT_SHARE


class FrameDropoutMasksConfig(Section):
    """Whole time steps, drawn per clip, are predicted from the others."""

    kind: Literal["frame_dropout"]
    dropped_share: ShareRange = Field(
        (0.5, 0.5), description="frame_dropout: share of time that is predicted; of a range, drawn per step"
    )


class MultiRateMasksConfig(Section):
    """The first part of a clip predicts single time steps at several distances after it."""

    kind: Literal["multi_rate"]
    context_share: ShareRange = _CONTEXT_SHARE
    steps_ahead: tuple[PositiveInt, ...] = Field(
        (1, 2, 4),
        min_length=1,
        description="multi_rate: the time steps that are predicted, counted from the last one of the context",
    )

    @model_validator(mode="after")
    def _each_once(self) -> "MultiRateMasksConfig":
        if list(self.steps_ahead) != sorted(set(self.steps_ahead)):
            raise ValueError(f"steps_ahead must go up, not {list(self.steps_ahead)}")
        return self


FrameMasksConfig = FutureMasksConfig | FrameDropoutMasksConfig | MultiRateMasksConfig

_MASK_KINDS: dict[str, type[Section]] = {
    "blocks": BlockMasksConfig,
    "future": FutureMasksConfig,
    "frame_dropout": FrameDropoutMasksConfig,
    "multi_rate": MultiRateMasksConfig,
}


def _of_its_kind(value: Any) -> Any:
    """A generator as its kind's section. (A tagged union of pydantic's would put the kind into every error's key.)"""
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a mask generator is a section of keys, not {value!r}")
    kind = value.get("kind", "blocks")
    if not isinstance(kind, str) or kind not in _MASK_KINDS:
        raise ValueError(f"no kind of masks {kind!r}; there are {', '.join(_MASK_KINDS)}")
    known = list(_MASK_KINDS[kind].model_fields)
    for key in value:
        if key not in known:
            others = [other for other, section in _MASK_KINDS.items() if key in section.model_fields]
            where = f"; it is one of {' and '.join(others)}" if others else ""
            raise ValueError(f"{key!r} is no key of masks of kind {kind}, which have {', '.join(known)}{where}")
    return _MASK_KINDS[kind].model_validate(value)


MaskGeneratorConfig = Annotated[BlockMasksConfig | FrameMasksConfig, BeforeValidator(_of_its_kind)]


class MasksConfig(Section):
    generators: tuple[MaskGeneratorConfig, ...] = Field(
        (
            BlockMasksConfig(blocks=8, spatial_scale=(0.15, 0.15)),
            BlockMasksConfig(blocks=2, spatial_scale=(0.7, 0.7)),
        ),
        min_length=1,
    )
    group: PositiveInt = Field(24, description="consecutive slots of the global batch that share one token count")
    truncate: Literal["random", "tail"] = Field(
        "random", description="how lists are cut to that count: a random subset, or dropping the latest (published)"
    )
    multiple_of: PositiveInt = Field(
        1,
        description="of blocks: counts are rounded down to a multiple of this (those below it stay), so that fewer "
        "lengths occur; not with a complement",
    )

    @model_validator(mode="after")
    def _complements_have_any_length(self) -> "MasksConfig":
        for number, generator in enumerate(self.generators):
            blocks = generator if isinstance(generator, BlockMasksConfig) else None
            if self.multiple_of > 1 and blocks and (blocks.full_complement or blocks.pred_full_complement):
                raise ValueError(f"multiple_of: a complement (generators.{number}) has whatever length is left")
        return self
