"""Published ``.pt`` files: what is read out of them, what is refused, and their optimiser's state."""

import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoint.formats_material import (
    SMALL,
    model,
    network_of,
    one_encoder,
    published_dict,
    random_tensors,
    same,
)
from vjepa_scale.checkpoint.formats import Match, open_weights, published_optimizer
from vjepa_scale.checkpoint.load import load_encoder, load_predictor, read_config
from vjepa_scale.core.errors import UserError
from vjepa_scale.model.positions import sincos_positions
from vjepa_scale.recipe.schema import ModelConfig

HEADS = "heads=3,predictor_heads=2"
PUBLISHED = Path(__file__).parents[1] / "published"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return random_tensors(model(SMALL), 7)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


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


def vit_g_file() -> dict[str, Any]:
    """The published dict of ViT-g, by the sizes of docs/method.md, with tensors that take no room."""

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(1).expand(shape)

    def block(prefix: str, width: int, hidden: int) -> dict[str, Tensor]:
        out = {}
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            out |= {f"{prefix}.{name}.weight": tensor(rows, columns), f"{prefix}.{name}.bias": tensor(rows)}
        for name in ("norm1", "norm2"):
            out |= {f"{prefix}.{name}.weight": tensor(width), f"{prefix}.{name}.bias": tensor(width)}
        return out

    encoder = {"pos_embed": tensor(1, 2048, 1408), "patch_embed.proj.weight": tensor(1408, 3, 2, 16, 16)}
    encoder |= {"patch_embed.proj.bias": tensor(1408), "norm.weight": tensor(1408), "norm.bias": tensor(1408)}
    for i in range(40):
        encoder |= block(f"blocks.{i}", 1408, 6144)
    predictor = {"predictor_pos_embed": tensor(1, 2048, 384), "predictor_embed.weight": tensor(384, 1408)}
    predictor |= {"predictor_embed.bias": tensor(384), "predictor_norm.weight": tensor(384)}
    predictor |= {"predictor_norm.bias": tensor(384), "predictor_proj.weight": tensor(1408, 384)}
    predictor |= {"predictor_proj.bias": tensor(1408)} | {f"mask_tokens.{j}": tensor(1, 1, 384) for j in range(10)}
    for i in range(12):
        predictor |= block(f"predictor_blocks.{i}", 384, 1536)

    def behind(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"module.backbone.{name}": value for name, value in state.items()}

    opt = {"state": {}, "param_groups": [{"params": list(range(9)), "lr": 1e-4} for _ in range(4)]}
    networks = {"encoder": behind(encoder), "predictor": behind(predictor), "target_encoder": behind(encoder)}
    return networks | {
        "opt": opt,
        "scaler": None,
        "epoch": 1,
        "loss": 0.4,
        "batch_size": 24,
        "world_size": 1,
        "lr": 1e-4,
    }


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


# -- the optimiser -----------------------------------------------------------------------------------


class Backbone(nn.Module):
    """The published networks as far as their parameters go: their names, order and a fixed table of positions."""

    def __init__(self, tensors: dict[str, Tensor], table: str) -> None:
        super().__init__()
        setattr(self, table, nn.Parameter(torch.ones(1, 4, 2), requires_grad=False))
        for name, value in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(value.clone()))


def trained_file(
    tensors: dict[str, Tensor], steps: int = 2
) -> tuple[dict[str, Any], torch.optim.AdamW, dict[str, Any]]:
    """A published dict after AdamW steps over four groups, the way the published code makes them."""
    networks = {
        "encoder": Backbone(network_of(tensors, "encoder"), "pos_embed"),
        "predictor": Backbone(network_of(tensors, "predictor"), "predictor_pos_embed"),
    }

    def group(network: str, decayed: bool) -> list[nn.Parameter]:
        named = networks[network].named_parameters()
        return [p for name, p in named if (("bias" not in name) and (len(p.shape) != 1)) == decayed]

    groups = [
        {"params": group("encoder", True)},
        {"params": group("predictor", True)},
        {"params": group("encoder", False), "weight_decay": 0},
        {"params": group("predictor", False), "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    parameters = {f"{n}.{name}": p for n, network in networks.items() for name, p in network.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for name, parameter in parameters.items():
            if parameter.requires_grad and not re.search(r"mask_tokens\.[12]$", name):  # those are never trained
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    content = published_dict(tensors)
    for name, network in networks.items():
        content[name] = {f"module.backbone.{key}": value for key, value in network.state_dict().items()}
    return content | {"opt": optimizer.state_dict()}, optimizer, parameters


def test_optimizer_state_goes_to_the_right_names(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    content, optimizer, parameters = trained_file(tensors)
    found = published_optimizer(saved(tmp_path / "x.pt", content), model=HEADS)
    wanted = {name for name in tensors if not name.startswith("target_encoder.")}
    assert found.keys() == wanted
    untrained = {"predictor.mask_tokens.1", "predictor.mask_tokens.2"}
    for name, state in found.items():
        if name in untrained:
            assert not any(value.any() for value in state.values())
            assert state["exp_avg"].shape == tensors[name].shape
            continue
        kept = optimizer.state[parameters[name]]
        assert same(state, {key: kept[key] for key in ("exp_avg", "exp_avg_sq", "step")}), name
        assert state["step"] == 2


def _group_of_another_length(opt: dict[str, Any]) -> None:
    opt["param_groups"][1]["params"].pop()


def _one_group(opt: dict[str, Any]) -> None:
    opt["param_groups"] = [{"params": list(opt["state"])}]


def _other_shape(opt: dict[str, Any]) -> None:
    opt["state"][3]["exp_avg"] = torch.zeros(3)


def _no_state(opt: dict[str, Any]) -> None:
    del opt["state"][3]


def _sgd(opt: dict[str, Any]) -> None:
    opt["state"] = {number: {"momentum_buffer": None} for number in opt["state"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_group_of_another_length, r"groups of \[\d+, \d+, \d+, \d+\] parameters, the networks have"),
        (_one_group, r"groups of \[\d+\] parameters, the networks have"),
        (_other_shape, r"exp_avg of encoder\.\S+ is \[3\], not \["),
        (_no_state, r"no AdamW state for encoder\."),
        (_sgd, r"no AdamW state for encoder\."),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content, _, _ = trained_file(tensors)
    change(content["opt"])
    with pytest.raises(UserError, match=message):
        published_optimizer(saved(tmp_path / "x.pt", content), model=HEADS)


def test_a_file_without_optimizer_or_in_another_order_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match="holds no optimiser state"):
        published_optimizer(saved(tmp_path / "x.pt", published_dict(tensors)), model=HEADS)
    content, _, _ = trained_file(tensors)
    content["encoder"] = dict(reversed(content["encoder"].items()))
    with pytest.raises(UserError, match="encoder: weights in another order"):
        published_optimizer(saved(tmp_path / "x.pt", content), model=HEADS)


def test_a_file_that_the_published_training_saved() -> None:
    """tests/published/checkpoint.pt: after k gradients g, exp_avg_sq sums to Σ (1 − β₂)·β₂^(K−k)·‖g‖², by name.

    The norms were measured by the published run itself, so that a moment under another name would show.
    """
    path, heads = PUBLISHED / "checkpoint.pt", "heads=2,predictor_heads=2"
    steps = load_file(PUBLISHED / "steps.safetensors")
    found = published_optimizer(path, model=heads)
    source = open_weights(path, model=heads, weights="both")
    assert found.keys() == {name for name, _, _ in source.entries if not name.startswith("target_encoder.")}
    assert source.networks() == {"encoder", "target_encoder", "predictor"}
    for name, state in found.items():
        norms = [float(steps.get(f"step{k}.norm.{name}", torch.zeros(()))) for k in range(3)]
        expected = sum(0.001 * 0.999 ** (2 - k) * norm**2 for k, norm in enumerate(norms))
        # float32 in the moments and in the recorded norms: about 1e-6 of each.
        assert float(state["exp_avg_sq"].double().sum()) == pytest.approx(expected, rel=1e-5), name
        assert state["step"] == (3 if expected else 0)
