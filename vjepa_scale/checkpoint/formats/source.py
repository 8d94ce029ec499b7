"""The neutral type between all formats: tensors under canonical names, read one at a time, and their configuration."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from torch import Tensor, nn

from vjepa_scale.checkpoint.safetensors_writer import Entry
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import parse_json
from vjepa_scale.core.installed import as_called
from vjepa_scale.masking.generator import generator_class
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.predictor import build_action_predictor
from vjepa_scale.recipe.networks import NETWORKS, Network
from vjepa_scale.recipe.registry import MASK_GENERATORS
from vjepa_scale.recipe.schema import ModelConfig
from vjepa_scale.recipe.sections import Positive, PositiveInt, Section

FORMAT: Final = "vjepa_scale.consolidated"
VERSION: Final = 1

# Choices of a caller: encoder.* is the EMA target encoder; the trained context encoder; or both, the context encoder as
# encoder.* and the target encoder as target_encoder.* where there are two.
Weights = Literal["target", "context", "both"]

# Block numbers in our names and Hugging Face's, with or without the network's prefix.
_BLOCK = re.compile(
    r"^(?:(encoder|target_encoder|predictor|action_predictor)\.)?(?:blocks|predictor_blocks|layer)\.(\d{1,18})\."
)


class ConsolidatedConfig(Section):
    """Description of the tensors. What a source of others does not contain is None, or listed in ``assumed``.

    weights:       encoder.* is the EMA target encoder or the context encoder; both: there are two
    networks:      networks in the source; sections of ``model`` for other networks are meaningless
    stage, step:   of our training: completed steps on the global step
    origin:        path of the file or folder, for weights that are not from our training
    mean, std:     per channel, for pixels in 0 … 1; the encoder expects (pixel − mean) / std
    frames, size, fps: clip of the last phase: T, (H, W) in pixels, frames per second
    assumed:       which of these the source does not contain: the values are those of most released models
    dtype:         type that the tensors were rounded to on request
    classes:       of a probe stored with them
    recipe:        the resolved recipe of the run
    """

    format: Literal["vjepa_scale.consolidated"] = FORMAT
    version: Literal[1] = VERSION
    model: ModelConfig
    weights: Weights | None = None
    networks: tuple[Network, ...] = ("encoder", "predictor")
    stage: str | None = None
    step: int | None = None
    origin: str | None = None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frames: PositiveInt
    size: tuple[PositiveInt, PositiveInt]
    fps: Positive
    assumed: tuple[Literal["frames", "size"], ...] = ()
    dtype: Literal["float32", "bfloat16"] | None = None
    classes: tuple[str, ...] = ()
    recipe: dict[str, Any] | None = Field(None, repr=False)

    def __str__(self) -> str:
        """Returns lines of YAML with all known values; of the recipe only its number of sections."""
        content = self.model_dump(mode="json", exclude_none=True, exclude={"recipe"})
        if self.recipe is not None:
            content["recipe"] = f"{len(self.recipe)} sections, in config.recipe"
        return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110).rstrip()

    def title(self) -> str:
        """Returns a description: ``the target encoder of pretrain at step 4``."""
        encoder = {None: "the encoder", "both": "both encoders"}.get(self.weights, f"the {self.weights} encoder")
        rounded = f" in {self.dtype}" if self.dtype else ""
        return f"{encoder} of {self.provenance()}{rounded}"

    def provenance(self) -> str:
        if self.stage is not None:
            return f"{self.stage} at step {self.step}"
        return Path(self.origin).name if self.origin is not None else "an unknown run"


def parse_config(content: Any, where: object) -> ConsolidatedConfig:
    """Returns the configuration in a parsed JSON. Raises UserError naming the wrong key under ``where``."""
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        found = content if isinstance(content, dict) else {}
        raise UserError(
            f"format {found.get('format')!r} {found.get('version')!r}; this program reads {FORMAT!r} {VERSION}",
            where=where,
            fix="consolidate the run again with this version",
        )
    try:
        return ConsolidatedConfig.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(problem["msg"], where=f"{where}.{key}" if key else where) from None


def read_config_file(path: Path) -> ConsolidatedConfig:
    """Reads the configuration in a separate JSON file, of a .pt or in a Hugging Face folder."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError:
        raise UserError(
            "not valid JSON", where=path, fix=as_called("write the weights again with tools/consolidate.py")
        ) from None
    return parse_config(content, f"{path}:config")


@dataclass(frozen=True)
class Match:
    """Result of matching stored tensors with a model: numbers and names that match or do not.

    ignored: names that the format is known to contain besides the weights
    """

    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def sentence(self) -> str:
        counts = (
            f"{self.matched} tensors match, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.reshaped)} of another shape"
        )
        if not self.ignored:
            return counts
        last = sorted({name.rpartition(".")[2] if name.endswith("pos_embed") else name for name in self.ignored})
        named = ", ".join(last[:4]) + (" …" if len(last) > 4 else "")
        return f"{counts}, {len(self.ignored)} ignored by name ({named})"


def match_shapes(
    stored: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    *,
    name: str,
    where: object,
    fix: str,
    allow: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> Match:
    """Compares names and shapes.

    allow:   prefixes of names that may be missing, unexpected or of another shape
    ignored: only for the message
    Raises UserError for all other differences, with the counts, the first names, and the depth where it differs.
    """
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    both = expected.keys() & stored.keys()
    reshaped = sorted(key for key in both if tuple(expected[key]) != tuple(stored[key]))
    found = Match(len(both) - len(reshaped), tuple(missing), tuple(unexpected), tuple(reshaped), ignored)
    refused = [
        *(f"{key} is missing" for key in _not_allowed(missing, allow)[:2]),
        *(f"{key} is unexpected" for key in _not_allowed(unexpected, allow)[:2]),
        *(f"{key} is {list(stored[key])}, not {list(expected[key])}" for key in _not_allowed(reshaped, allow)[:2]),
    ]
    if not refused:
        return found
    here, there = depths(stored), depths(expected)
    blocks = "".join(
        f"{here.get(network, 0)} blocks in the file, {depth} in the model; "
        for network, depth in there.items()
        if here.get(network, 0) != depth
    )
    raise UserError(f"{name}: {blocks}{found.sentence()}: {'; '.join(refused)}", where=where, fix=fix)


def _not_allowed(names: Iterable[str], allow: tuple[str, ...]) -> list[str]:
    return [name for name in names if not name.startswith(allow)] if allow else list(names)


def depths(names: Iterable[str]) -> dict[str, int]:
    """Returns the number of blocks of each network, from the names; names without a network's prefix count for ""."""
    out: dict[str, int] = {}
    for name in names:
        if found := _BLOCK.match(name):
            network = found[1] or ""
            out[network] = max(out.get(network, 0), int(found[2]) + 1)
    return out


BUILDERS: Final[dict[str, Callable[[ModelConfig], nn.Module]]] = {
    "encoder": Encoder,
    "predictor": Predictor,
    "action_predictor": build_action_predictor,
}


def network_shapes(config: ModelConfig, network: str) -> dict[str, torch.Size]:
    """Returns canonical names, with the network's prefix, and shapes of all weights, as in ``named_parameters``."""
    build = BUILDERS.get(network, Encoder)
    with torch.device("meta"):
        module = build(config)
    return {f"{network}.{name}": parameter.shape for name, parameter in module.named_parameters()}


@dataclass(frozen=True)
class WeightSource:
    """Weights on disk, of any format.

    where:    the file or folder, for messages
    config:   their configuration
    entries:  (canonical name, shape, dtype): encoder.*, predictor.* or action_predictor.* and, if both encoders were
              requested and exist, target_encoder.*
    read:     reads one tensor by its name; it may share memory with a mapped file: do not write to it
    ignored:  names of other stored tensors, which are left out
    kind:     name of the format
    """

    where: Path
    config: ConsolidatedConfig
    entries: list[Entry]
    read: Callable[[str], Tensor]
    ignored: tuple[str, ...] = ()
    kind: str = "a checkpoint"
    _shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._shapes.update({name: shape for name, shape, _ in self.entries})

    def networks(self) -> set[str]:
        return {name.partition(".")[0] for name in self._shapes}

    def match(self, config: ModelConfig | None = None, *, allow: tuple[str, ...] = ()) -> Match:
        """Compares all tensors with a model, by default with that of ``config``.

        allow: prefixes of canonical names that may be missing, unexpected or of another shape. Raises UserError.
        """
        expected: dict[str, Sequence[int]] = {}
        for network in sorted(self.networks()):
            expected |= network_shapes(config or self.config.model, network)
        fix = "give the model that these weights are of"
        return match_shapes(
            self._shapes, expected, name=self.kind, where=self.where, fix=fix, allow=allow, ignored=self.ignored
        )

    def only(self, networks: Iterable[str]) -> "WeightSource":
        """Returns a source with some of the networks."""
        prefixes = tuple(f"{network}." for network in networks)
        return replace(
            self,
            config=self.config.model_copy(update={"networks": tuple(n for n in NETWORKS if f"{n}." in prefixes)}),
            entries=[entry for entry in self.entries if entry[0].startswith(prefixes)],
        )

    def rounded(self, dtype: Literal["float32", "bfloat16"]) -> "WeightSource":
        """Returns a source with the same tensors in another type."""
        to = getattr(torch, dtype)
        return replace(
            self,
            config=self.config.model_copy(update={"dtype": dtype}),
            entries=[(name, shape, to) for name, shape, _ in self.entries],
            read=lambda name: self.read(name).to(to),
        )


# -- the mask token for predictions, from a checkpoint's recipe ------------------------------------


def trained_mask_token(config: ConsolidatedConfig) -> int:
    """Returns the mask token that predictions of large areas were trained with.

    A recipe's mask generator j trains token j (modulo their number), unless ``jepa.mask_token`` makes all train the
    first.
    """
    if config.recipe is None:
        # Released weights trained the first; transformers, whose folders may have any origin, predicts with 1.
        return 0 if config.origin is not None and Path(config.origin).is_file() else 1
    several = len(config.recipe.get("masks", {}).get("generators", (0, 0))) > 1
    return int(several and config.recipe.get("jepa", {}).get("mask_token") != "first")


def future_mask_token(config: ConsolidatedConfig) -> int:
    """Returns the mask token that predictions of the future were trained with: that of the first mask generator whose
    context is only the past. Where there is none, returns ``trained_mask_token``."""
    recipe = config.recipe or {}
    if recipe.get("jepa", {}).get("mask_token") != "first":
        for number, generator in enumerate(recipe.get("masks", {}).get("generators", ())):
            if _hides_the_future(generator):
                return number
    return trained_mask_token(config)


def _hides_the_future(generator: dict[str, Any]) -> bool:
    kind = generator.get("kind", "blocks")
    return kind in MASK_GENERATORS and generator_class(kind).hides_future(generator)
