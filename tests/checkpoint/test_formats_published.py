"""Files of the published format: what is read of them, and what is refused."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.formats_material import (
    SMALL,
    model,
    network_of,
    one_encoder,
    published_dict,
    same,
)
from tests.checkpoint.published_material import HEADS, saved, vit_g_file
from vjepa_scale.checkpoint.formats import Match, open_weights, published_optimizer
from vjepa_scale.checkpoint.load import load_encoder, load_predictor, read_config
from vjepa_scale.core.errors import UserError
from vjepa_scale.model.positions import sincos_positions
from vjepa_scale.recipe.schema import ModelConfig

# -- what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.backbone.", "module.", ""])
def test_sizes_come_from_the_tensors_and_heads_from_the_user(
    tmp_path: Path, tensors: dict[str, Tensor], prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "x.pt", published_dict(tensors, prefix))
    source = open_weights(path, model=HEADS)
    assert source.config.model == model(SMALL)
    assert source.config.model.rope.layout == "tiled"
    assert (source.config.weights, source.config.stage, source.config.assumed) == ("target", None, ("frames", "size"))
    count = len(one_encoder(tensors))
    assert source.match() == Match(count, ignored=("encoder.pos_embed", "predictor.predictor_pos_embed"))
    assert source.match().sentence() == (
        f"{count} tensors match, 0 missing, 0 unexpected, 0 of another shape, "
        "2 ignored by name (pos_embed, predictor_pos_embed)"
    )
    assert same({name: source.read(name) for name, _, _ in source.entries}, one_encoder(tensors))
    assert same(load_encoder(path, model=HEADS).state_dict(), network_of(tensors, "target_encoder"))
    assert f"{path}: encoder: 28 tensors match" in capsys.readouterr().err
    assert same(load_predictor(path, model=model(SMALL)).state_dict(), network_of(tensors, "predictor"))
    both = open_weights(path, model=HEADS, weights="both")
    assert same({name: both.read(name) for name, _, _ in both.entries}, tensors)


@torch.no_grad()
def test_changing_what_was_loaded_leaves_the_file_alone(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "x.pt", published_dict(tensors))
    before = path.read_bytes()
    for parameter in load_encoder(path, model=HEADS).parameters():
        parameter.add_(1)
    assert path.read_bytes() == before
    assert same(load_encoder(path, model=HEADS).state_dict(), network_of(tensors, "target_encoder"))


def test_files_with_less_in_them_load_where_that_is_enough(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    content = published_dict(tensors)
    alone = saved(tmp_path / "encoder.pt", {"encoder": content["encoder"]})
    assert same(load_encoder(alone, model="heads=3").state_dict(), network_of(tensors, "encoder"))
    config = read_config(alone, model="heads=3")
    assert (config.networks, config.weights) == (("encoder",), None)
    with pytest.raises(UserError, match="holds no predictor"):
        load_predictor(alone, model=HEADS)
    with pytest.raises(UserError, match=r"holds no target_encoder .*ask for the context encoder"):
        open_weights(alone, model=HEADS, weights="target")
    old = tmp_path / "old.pt"
    torch.save(content, old, _use_new_zipfile_serialization=False)
    assert same(load_encoder(old, model=HEADS).state_dict(), network_of(tensors, "target_encoder"))


def test_a_file_of_vit_g_loads(tmp_path: Path) -> None:
    """ViT-g, 12 predictor blocks and 10 mask tokens, as released; every tensor is one number, expanded."""
    config = ModelConfig.model_validate({"encoder": "vit_giant", "predictor": {"mask_tokens": 10}})
    content = vit_g_file()
    path = saved(tmp_path / "vitg.pt", content)
    assert path.stat().st_size < 2_000_000
    source = open_weights(path, model="vit_giant")
    assert source.config.model == config
    shapes = {name: shape for name, shape, _ in source.entries}
    assert shapes["encoder.blocks.39.mlp.fc1.weight"] == (6144, 1408)
    assert shapes["predictor.mask_tokens.9"] == (1, 1, 384)
    # docs/method.md 2: 1.01 billion, to the digits given there
    encoder = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("encoder."))
    assert round(encoder / 1e9, 2) == 1.01
    assert source.match().matched == 40 * 12 + 4 + 12 * 12 + 4 + 10 + 2
    with pytest.raises(UserError, match="number of heads is not in such a file"):
        open_weights(path)
    for name, message in (
        ("vit_large", "40 blocks in the file, 24 in vit_large"),
        ("heads=5", r"width 1408 over 5 heads"),
        ("vit_enormous", "no model named 'vit_enormous'"),
        ("heads=x", "'heads=x' in 'heads=x'"),
    ):
        with pytest.raises(UserError, match=message):
            open_weights(path, model=name)
    recipe = ModelConfig.model_validate({"encoder": "vit_large"})
    with pytest.raises(UserError, match="40 blocks in the file, 24 in the recipe"):
        open_weights(path, model=recipe)
    with pytest.raises(UserError, match="predictor: 10 mask tokens in the file, 2 in the recipe"):
        open_weights(path, model=ModelConfig.model_validate({"encoder": "vit_giant"}))
    assert open_weights(path, model=recipe.model_copy(update={"encoder": config.encoder}), networks=["encoder"])
    # 16 heads is another model of the same width: it is the user who says so.
    assert open_weights(path, model="heads=16").config.model.encoder.heads == 16

    del content["target_encoder"]["module.backbone.blocks.39.norm2.bias"]
    with pytest.raises(UserError, match=r"1 missing.*encoder\.blocks\.39\.norm2\.bias is missing"):
        open_weights(saved(tmp_path / "hole.pt", content), model="vit_giant")


@torch.no_grad()
def test_sine_cosine_tables_must_be_those_of_the_recipe(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    tree = SMALL | {"positions": "sincos", "sincos": {"frames": 8, "size": 32}}
    grid, tables = (4, 4, 4), {}
    for name, width in (("pos_embed", 48), ("predictor_pos_embed", 24)):
        tables[name] = sincos_positions(None, grid=grid, width=width, config=model(tree))[None]
    content = published_dict(tensors)
    for network, table in (
        ("encoder", "pos_embed"),
        ("predictor", "predictor_pos_embed"),
        ("target_encoder", "pos_embed"),
    ):
        content[network]["module.backbone." + table] = tables[table].clone()
    path = saved(tmp_path / "x.pt", content)
    assert open_weights(path, model=model(tree)).config.model.positions == "sincos"
    for other in ({"frames": 16, "size": 32}, {"frames": 8, "size": 32, "uniform_power": False}):
        with pytest.raises(UserError, match=r"table of positions is not that of model\.sincos"):
            open_weights(path, model=model(SMALL | {"positions": "sincos", "sincos": other}))


# -- what is refused ---------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.fault(
    "hostile",
    "a `.pt` file that would run code when it is loaded",
    "refused; the code does not run",
)
@pytest.mark.parametrize("new", [True, False])
def test_a_malicious_pickle_is_refused_without_running(tmp_path: Path, tensors: dict[str, Tensor], new: bool) -> None:
    content = published_dict(tensors) | {"loss": Malicious(tmp_path / "ran")}
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=new)
    for load in (load_encoder, read_config, published_optimizer):
        with pytest.raises(UserError, match=r"it names \w+\.mkdir, code that loading it would run: refused"):
            load(path, model=HEADS)  # type: ignore[operator]
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the file is malicious"


def _newer(content: dict[str, Any]) -> dict[str, Any]:
    content["encoder"]["module.backbone.norms_block.0.weight"] = torch.ones(48)
    return content


def _pictures(content: dict[str, Any]) -> dict[str, Any]:
    content["target_encoder"]["module.backbone.patch_embed.proj.weight"] = torch.zeros(48, 3, 8, 8)
    return content


def _stranger(content: dict[str, Any]) -> dict[str, Any]:
    content["target_encoder"]["module.backbone.blocks.1.mlp.fc3.weight"] = torch.zeros(2)
    return content


def _reshaped(content: dict[str, Any]) -> dict[str, Any]:
    content["predictor"]["module.backbone.predictor_proj.bias"] = torch.zeros(47)
    return content


def _twice(content: dict[str, Any]) -> dict[str, Any]:
    content["encoder"]["module.norm.weight"] = torch.ones(48)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_newer, r"encoder\.norms_block\.0\.weight: weights of V-JEPA 2\.1"),
        (_pictures, "patch embedding is .* of pictures"),
        (_stranger, r"0 missing, 1 unexpected.*encoder\.blocks\.1\.mlp\.fc3\.weight is unexpected"),
        (_reshaped, r"1 of another shape.*predictor\.predictor_proj\.bias is \[47\], not \[48\]"),
        (_twice, "norm.weight comes twice"),
        (lambda content: content | {"extra": {"w": torch.ones(1)}}, "unknown weights 'extra'"),
        (lambda content: content | {"encoder": [1]}, "encoder: not a dict of tensors"),
        (lambda content: {"classifiers": [content["encoder"]]}, r"no encoder in this file \(classifiers\)"),
        (lambda content: content["encoder"]["module.backbone.norm.weight"], r"no encoder in this file \(Tensor\)"),
    ],
)
def test_other_content_is_named_for_what_it_is(
    tmp_path: Path, tensors: dict[str, Tensor], change: Callable[[Any], Any], message: str
) -> None:
    path = saved(tmp_path / "x.pt", change(published_dict(tensors)))
    with pytest.raises(UserError, match=message) as error:
        open_weights(path, model=HEADS)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"not a checkpoint\n" * 20,
        lambda data: data[:100],
        lambda data: pickle.dumps({"encoder": 1}),
        lambda data: data[:-200] + bytes(200),
    ],
)
def test_damaged_and_unknown_files_are_one_clear_error(
    tmp_path: Path, tensors: dict[str, Tensor], damage: Callable[[bytes], bytes]
) -> None:
    path = saved(tmp_path / "x.pt", published_dict(tensors))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"PyTorch checkpoint|not a dict of tensors") as error:
        open_weights(path, model=HEADS)
    assert str(path) in str(error.value)


@pytest.mark.fault(
    "hostile",
    "a `.pt` of any bytes",
    "one error that names the file",
)
def test_any_bytes_are_one_clear_error(tmp_path: Path) -> None:
    generator, path = random.Random(0), tmp_path / "x.pt"
    for _ in range(300):
        path.write_bytes(b"\x80\x02" + generator.randbytes(64))
        with pytest.raises(UserError, match=r"PyTorch checkpoint|it names|no encoder in this file"):
            open_weights(path, model=HEADS)


def test_the_json_beside_a_file_must_be_its_own(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "x.pt", published_dict(tensors))
    (tmp_path / "x.pt.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.pt\.json: not valid JSON"):
        open_weights(path)
    config = read_config(saved(tmp_path / "y.pt", published_dict(tensors)), model=HEADS)
    (tmp_path / "x.pt.json").write_text(config.model_dump_json())
    assert read_config(path).model == model(SMALL)
    with pytest.raises(UserError, match="encoder: 3 heads in the file, 2 in the recipe"):
        open_weights(path, model=model(SMALL | {"encoder": SMALL["encoder"] | {"heads": 2}}))
    deeper = config.model_copy(update={"model": model(SMALL | {"encoder": SMALL["encoder"] | {"depth": 3}})})
    (tmp_path / "x.pt.json").write_text(deeper.model_dump_json())
    with pytest.raises(UserError, match="2 blocks in the file, 3 in the model"):
        open_weights(path)


def test_released_weights_are_of_the_tiled_layout(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "x.pt", published_dict(tensors))
    with pytest.raises(UserError, match=r"rope\.layout tiled in the file, interleaved in the recipe"):
        open_weights(path, model=model(SMALL | {"rope": {"layout": "interleaved"}}))
