"""docs/method.md says what the code does: its tables are read and compared with defaults, recipes and networks."""

import dataclasses
import math
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vjepa_scale.model import ActionPredictor, Encoder
from vjepa_scale.model.positions import rope_tables
from vjepa_scale.planning.cem import PlanConfig
from vjepa_scale.recipe import load_recipe
from vjepa_scale.recipe.schema import ENCODERS, ModelConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "method.md").read_text()


def tables() -> list[list[list[str]]]:
    """Every table of the page, as rows of cells; the first row is the header."""
    found = re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE)
    rows = [
        [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in t.splitlines()]
        for t in found
    ]
    return [[row for row in table if set(row[0]) != {"-"}] for table in rows]


def table(*header: str) -> list[list[str]]:
    """The rows of all tables whose header begins so."""
    out = [row for t in tables() if t[0][: len(header)] == list(header) for row in t[1:]]
    assert out, header
    return out


def number(text: str) -> float:
    return float(text.replace(",", ""))


def value(text: str) -> Any:
    return [number(item) for item in text[1:-1].split(",")] if text.startswith("[") else _scalar(text)


def _scalar(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)


@cache
def defaults(folder: Path) -> dict[str, Any]:
    """A recipe that gives what has no default, resolved."""
    stage = {"steps": 10, "phases": [{"name": "all"}]}
    recipe = {
        "run": {"dir": "runs/x"},
        "data": {"sets": {"a": {"path": "a"}, "b": {"path": "b", "weight": 0}}},
        "model": {"encoder": "vit_large"},
        "pretrain": {**stage, "phases": [{"name": "all", "start_lr": 1e-4}]},
        "action": {"init_from": "pretrain", **stage, "phases": [{"name": "all", "start_lr": 1e-4}]},
        "probe": {"init_from": "pretrain", "evaluate_on": "b", **stage, "phases": [{"name": "all", "start_lr": 1e-4}]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path).model_dump(mode="json")


def at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def test_defaults(tmp_path: Path) -> None:
    rows = table("key", "default")
    assert len(rows) > 45
    tree = defaults(tmp_path)
    wrong = [(key, text, at(tree, key)) for key, text in rows if at(tree, key) != value(text)]
    assert not wrong


def test_numbers_of_recipes() -> None:
    rows = table("key of recipes/vitg_384.yaml", "value")
    assert len(rows) > 15
    tree = load_recipe(ROOT / "recipes" / "vitg_384.yaml").model_dump(mode="json")
    assert not [(key, text, at(tree, key)) for key, text in rows if at(tree, key) != value(text)]


def test_sizes_of_encoders() -> None:
    rows = table("model.encoder", "D")
    assert [row[0].split()[0] for row in rows] == list(ENCODERS)
    for name, *sizes, parameters in rows:
        name = name.split()[0]
        assert tuple(map(int, sizes)) == ENCODERS[name]
        with torch.device("meta"):
            encoder = Encoder(ModelConfig(encoder=name))  # type: ignore[arg-type]
        billions = parameters.removesuffix(" B")
        digits = len(billions.partition(".")[2])
        assert round(sum(p.numel() for p in encoder.parameters()) / 1e9, digits) == float(billions), name


def test_size_of_the_action_predictor() -> None:
    said = re.search(r"([\d.]+) B parameters for ViT-g", PAGE)
    assert said
    model = ModelConfig(encoder="vit_giant")  # type: ignore[arg-type]
    with torch.device("meta"):
        predictor = ActionPredictor(model.action_predictor, encoder_width=model.encoder.width)
    assert round(sum(p.numel() for p in predictor.parameters()) / 1e9, 2) == float(said[1])


def test_tokens_of_clips() -> None:
    with torch.device("meta"):
        embed = Encoder(ModelConfig(encoder="vit_tiny")).patch_embed  # type: ignore[arg-type]
    for frames, size, grid, tokens in table("frames", "size", "grid"):
        clip = torch.empty(1, 3, int(frames), int(size), int(size), device="meta")
        assert embed.grid(clip) == tuple(map(int, grid.split("×")))
        assert math.prod(embed.grid(clip)) == number(tokens)


@pytest.mark.parametrize("layout", ["tiled", "interleaved"])
def test_channels_that_rope_rotates(layout: Any) -> None:
    """A token that is far along one axis alone differs from the first one in that axis's channels alone."""
    for row in table("d", "time"):
        d, *groups = map(int, row)
        tables = rope_tables(None, grid=(2, 2, 2), head_dim=d, layout=layout)
        moved = [(tables.cos[0] != tables.cos[n]).nonzero().flatten().tolist() for n in (4, 2, 1)]
        first = 0
        for axis, channels in zip(moved, groups[:3], strict=True):
            assert axis == list(range(first, first + channels))
            first += channels
        assert first + groups[3] == d


def test_default_masks(tmp_path: Path) -> None:
    generators = at(defaults(tmp_path), "masks.generators")
    for row, generator in zip(table("generator", "blocks"), generators, strict=True):
        _, blocks, spatial, temporal, aspect = row
        assert generator["blocks"] == int(blocks)
        assert generator["spatial_scale"] == 2 * [float(spatial)]
        assert generator["temporal_scale"] == 2 * [float(temporal)]
        assert generator["aspect_ratio"] == [float(end) for end in aspect.split("–")]


def test_default_plan() -> None:
    rows = {name: float(text) for name, text, _ in table("PlanConfig", "default")}
    assert rows == dataclasses.asdict(PlanConfig())


def test_overrides_and_choices_that_the_page_names_are_in_the_schema() -> None:
    """``section.key`` and ``section.key: value`` outside the tables, too."""
    named = set(re.findall(r"`((?:model|masks|jepa|optimizer|engine|data|pretrain)\.[\w.]*\w)(?:: (\w+))?`", PAGE))
    assert len(named) > 40
    recipe = ROOT / "recipes" / "vitg_384.yaml"
    tree = load_recipe(recipe).model_dump(mode="json")
    for key, choice in named:
        if not re.search(r"generators|NAME|sets\.", key):
            at(tree, key)
            if choice:
                load_recipe(recipe, [f"{key}={choice}"])


def test_modules_exist() -> None:
    for path in re.findall(r"`vjepa_scale/([\w/]+)\.py`", PAGE):
        pkgutil.resolve_name("vjepa_scale." + path.replace("/", "."))
