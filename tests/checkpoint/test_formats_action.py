"""Action-conditioned weights: of which stage, in which format, under which names; and that no bit changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.action_material import (
    ACTION,
    action_run,
    action_tensors,
    published_action_dict,
    save_stage,
)
from tests.checkpoint.formats_material import model, network_of, one_encoder, random_tensors, same
from tests.checkpoint.published_material import vit_g_file
from tests.published import inputs
from vjepa_scale.checkpoint.consolidate import consolidate
from vjepa_scale.checkpoint.formats import open_weights, published_optimizer
from vjepa_scale.checkpoint.load import load_action_predictor, load_encoder, load_predictor, read_config
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.schema import ActionPredictorConfig

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HEADS = f"heads={inputs.HEADS},predictor_heads={inputs.ACTION_HEADS}"


def all_of(path: Path, **options: Any) -> dict[str, Tensor]:
    source = open_weights(path, **options)
    source.match()
    return {name: source.read(name).clone() for name, _, _ in source.entries}


# -- round trips -----------------------------------------------------------------------------------


def test_no_bit_changes_from_format_to_format(tmp_path: Path) -> None:
    tensors = action_run(tmp_path / "run")
    consolidate(tmp_path / "run/action", tmp_path / "a")
    consolidate(tmp_path / "run/action", tmp_path / "b", to="published")
    consolidate(tmp_path / "a", tmp_path / "c", to="published")
    consolidate(tmp_path / "b/model.pt", tmp_path / "d")
    assert same(load_file(tmp_path / "a/model.safetensors"), tensors)
    for folder in "abcd":
        assert same(all_of(tmp_path / folder), tensors), folder
        assert read_config(tmp_path / folder) == read_config(tmp_path / "run/action"), folder
    config = read_config(tmp_path / "a")
    told = (config.networks, config.weights, config.stage, config.title())
    assert told == (("encoder", "action_predictor"), "target", "action", "the target encoder of action at step 4")
    assert config.model == model(ACTION)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "d/model.safetensors").read_bytes()

    consolidate(tmp_path / "run/action", tmp_path / "alone", encoder_only=True)
    assert same(all_of(tmp_path / "alone"), {f"encoder.{k}": v for k, v in network_of(tensors, "encoder").items()})
    assert read_config(tmp_path / "alone").networks == ("encoder",)
    for folder in ("run/action", "a", "b"):
        assert same(load_encoder(tmp_path / folder).state_dict(), network_of(tensors, "encoder"))
        assert same(load_action_predictor(tmp_path / folder).state_dict(), network_of(tensors, "action_predictor"))
        with pytest.raises(UserError, match="holds no predictor"):
            load_predictor(tmp_path / folder)


def test_what_is_written_has_the_published_names(tmp_path: Path) -> None:
    """Compared with action_file.json, which the published modules made: the same sizes here."""
    tree = {
        "encoder": {"width": inputs.WIDTH, "depth": inputs.DEPTH, "heads": inputs.HEADS},
        "action_predictor": {"width": inputs.ACTION_WIDTH, "depth": inputs.ACTION_DEPTH, "heads": inputs.ACTION_HEADS},
        "patch": inputs.PATCH,
    }
    tensors = action_run(tmp_path / "run", tree=tree)
    consolidate(tmp_path / "run/action", tmp_path / "out", to="published")
    found, wanted = torch.load(tmp_path / "out/model.pt", weights_only=True), published_action_dict()
    assert found.keys() == wanted.keys()
    for network in ("encoder", "predictor", "target_encoder"):
        assert list(found[network]) == list(wanted[network])
        assert [value.shape for value in found[network].values()] == [v.shape for v in wanted[network].values()]
    assert torch.equal(
        found["predictor"]["module.extrinsics_encoder.bias"], tensors["action_predictor.extrinsics_encoder.bias"]
    )
    size = (tmp_path / "out/model.pt").stat().st_size
    assert size < 1.2 * sum(value.nbytes for value in tensors.values()) + 50_000, "one encoder is stored once"


@pytest.mark.parametrize("encoder_only", [False, True])
def test_transformers_has_no_such_network(tmp_path: Path, encoder_only: bool) -> None:
    action_run(tmp_path / "run")
    message = "there is no predictor" if encoder_only else "its predictor is an action-conditioned one"
    with pytest.raises(UserError, match=message):
        consolidate(tmp_path / "run/action", tmp_path / "hf", to="huggingface", encoder_only=encoder_only)
    assert not (tmp_path / "hf").exists()


# -- which checkpoint a run means ------------------------------------------------------------------


def test_what_is_wanted_says_which_stage_of_a_run(tmp_path: Path) -> None:
    run, config = tmp_path / "run", model(ACTION)
    cooldown = save_stage(run, "cooldown", random_tensors(config, 1))
    action = save_stage(run, "action", action_tensors(config, 2))
    frozen = network_of(action, "encoder")
    probe = {f"encoder.{k}": v for k, v in network_of(action_tensors(config, 3), "encoder").items()}
    save_stage(run, "probe", probe | {"probe_0.linear.weight": torch.ones(2, 48)})
    assert same(all_of(run), one_encoder(cooldown))
    assert same(load_encoder(run).state_dict(), network_of(cooldown, "target_encoder"))
    assert same(load_predictor(run).state_dict(), network_of(cooldown, "predictor"))
    assert same(load_action_predictor(run).state_dict(), network_of(action, "action_predictor"))
    assert same(all_of(run, networks=("encoder", "action_predictor")), action)
    assert same(load_encoder(run / "action").state_dict(), frozen)
    for weights in ("target", "both", None):
        source = open_weights(run / "action", weights=weights)  # type: ignore[arg-type]
        assert (source.networks(), source.config.weights) == ({"encoder", "action_predictor"}, "target")
    with pytest.raises(UserError, match="holds the target encoder only"):
        open_weights(run / "action", weights="context")
    # A probe's checkpoint is its frozen encoder, without the probes.
    assert same(all_of(run / "probe"), probe)
    assert read_config(run / "probe").networks == ("encoder",)
    for stage in ("cooldown", "probe"):
        with pytest.raises(UserError, match="holds no action_predictor"):
            load_action_predictor(run / stage)


def test_runs_without_such_stages(tmp_path: Path) -> None:
    config = model(ACTION)
    save_stage(tmp_path / "pretrained", "pretrain", random_tensors(config, 1))
    with pytest.raises(UserError, match=r"no checkpoint of the action stage.*run that stage"):
        load_action_predictor(tmp_path / "pretrained")
    # One that began with weights of others has nothing but the action stage.
    action = action_run(tmp_path / "later")
    assert same(load_encoder(tmp_path / "later").state_dict(), network_of(action, "encoder"))
    with pytest.raises(UserError, match="holds no predictor"):
        load_predictor(tmp_path / "later")
    # Probes without an encoder, and a run of nothing but probes, are no encoder's result.
    save_stage(tmp_path / "probed", "probe", {"probe_0.linear.weight": torch.ones(2, 48)})
    with pytest.raises(UserError, match="no checkpoint in it"):
        load_encoder(tmp_path / "probed")
    with pytest.raises(UserError, match=r"holds no tensor encoder\.\*"):
        load_encoder(tmp_path / "probed/probe")
    # The stage must hold what it is for.
    save_stage(tmp_path / "half", "action", {k: v for k, v in action.items() if k.startswith("encoder.")})
    with pytest.raises(UserError, match=r"holds no tensor action_predictor\.\*"):
        load_encoder(tmp_path / "half")


# -- files of others -------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    torch.save(published_action_dict(), tmp_path / "ac.pt")
    return tmp_path / "ac.pt"


def test_a_published_file_says_sizes_and_the_user_heads(foreign: Path, tmp_path: Path) -> None:
    source = open_weights(foreign, model=HEADS)
    found = source.config.model
    # Pictures of 256 pixels are assumed, and so is their grid, to which nothing is rescaled then.
    assert found.action_predictor == ActionPredictorConfig(
        width=inputs.ACTION_WIDTH,
        depth=inputs.ACTION_DEPTH,
        heads=inputs.ACTION_HEADS,
        mlp_hidden=4 * inputs.ACTION_WIDTH,
        grid=(64, 64),
    )
    assert (source.config.networks, source.config.weights) == (("encoder", "action_predictor"), "target")
    assert not source.match().missing
    tensors = {name: source.read(name) for name, _, _ in source.entries}
    content = published_action_dict()
    for network, theirs in (("encoder", "encoder"), ("action_predictor", "predictor")):
        assert same(network_of(tensors, network), {k.removeprefix("module."): v for k, v in content[theirs].items()})

    consolidate(foreign, tmp_path / "out", model=HEADS, size=16, frames=8)
    assert read_config(tmp_path / "out").model.action_predictor.grid == (4, 4)
    with pytest.raises(UserError, match="action_predictor: 2 heads in the file"):
        open_weights(tmp_path / "out", model=f"heads={inputs.HEADS},predictor_heads=4")

    # Without its predictor; with one encoder, of which the frozen one is all that there is.
    assert open_weights(foreign, model="heads=2", networks=("encoder",)).config.networks == ("encoder",)
    del content["target_encoder"]
    torch.save(content, foreign)
    for weights in ("target", None):
        source = open_weights(foreign, model=HEADS, weights=weights)  # type: ignore[arg-type]
        assert (source.networks(), source.config.weights) == ({"encoder", "action_predictor"}, weights)


def test_a_whole_model_says_what_a_file_cannot(foreign: Path) -> None:
    tree: dict[str, Any] = {
        "encoder": {"width": inputs.WIDTH, "depth": inputs.DEPTH, "heads": inputs.HEADS},
        "action_predictor": {"width": inputs.ACTION_WIDTH, "depth": inputs.ACTION_DEPTH, "heads": inputs.ACTION_HEADS},
        "patch": inputs.PATCH,
    }
    tree["action_predictor"] |= {"extrinsics": True, "grid": 4}
    assert open_weights(foreign, model=model(tree)).config.model == model(tree)
    for change, message in (
        ({"depth": 3}, "action_predictor: 2 blocks in the file, 3 in the recipe"),
        ({"layout": "interleaved"}, "layout tiled in the file, interleaved in the recipe"),
        ({"mlp_hidden": 100}, "160 hidden channels in the file, 100 in the recipe"),
    ):
        other = tree | {"action_predictor": tree["action_predictor"] | change}
        with pytest.raises(UserError, match=message):
            open_weights(foreign, model=model(other))
    config = open_weights(foreign, model=model(tree)).config
    foreign.with_name("ac.pt.json").write_text(config.model_dump_json())
    assert open_weights(foreign).config == config
    for key, value in (("extrinsics", False), ("grid", 5)):
        other = tree | {"action_predictor": tree["action_predictor"] | {key: value}}
        with pytest.raises(UserError, match=f"action_predictor: {key} "):
            open_weights(foreign, model=model(other))


def test_what_does_not_fit_is_said(foreign: Path) -> None:
    for given, message in (
        (None, "number of heads is not in such a file"),
        ("heads=2", r"its predictor is 40 wide, and its number of heads.*--model heads=2,predictor_heads="),
        ("vit_giant", "2 blocks in the file, 40 in vit_giant"),
        ("heads=2,predictor_heads=3", "width 40 over 3 heads"),
    ):
        with pytest.raises(UserError, match=message):
            open_weights(foreign, model=given)
    for load in (load_predictor, published_optimizer):
        with pytest.raises(UserError, match=r"holds no predictor.*load_world_model"):
            load(foreign, model=HEADS)  # type: ignore[operator]
    content = published_action_dict()
    del content["predictor"]["module.state_encoder.bias"]
    torch.save(content, foreign)
    with pytest.raises(UserError, match=r"1 missing.*action_predictor\.state_encoder\.bias is missing"):
        open_weights(foreign, model=HEADS)


def test_the_released_sizes_need_the_encoders_name_only(tmp_path: Path) -> None:
    """ViT-g and 24 blocks of width 1024; every tensor is one number, expanded."""
    content = vit_g_file()
    content["predictor"] = {
        name: torch.zeros(1).expand(shape)
        for name, shape in published_shapes(width=1024, depth=24, encoder=1408).items()
    }
    torch.save(content, tmp_path / "x.pt")
    source = open_weights(tmp_path / "x.pt", model="vit_giant", networks=("action_predictor",))
    assert source.config.model.action_predictor == ActionPredictorConfig()
    # docs/method.md 8: about 300 million
    assert round(sum(torch.Size(shape).numel() for _, shape, _ in source.entries) / 1e8) == 3


def published_shapes(*, width: int, depth: int, encoder: int) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        out.update({f"module.{name}.weight": (rows, columns), f"module.{name}.bias": (rows,)})

    linear("predictor_embed", width, encoder)
    for name, channels in (("action", 7), ("state", 7), ("extrinsics", 6)):
        linear(f"{name}_encoder", width, channels)
    for i in range(depth):
        linear(f"predictor_blocks.{i}.attn.qkv", 3 * width, width)
        linear(f"predictor_blocks.{i}.attn.proj", width, width)
        linear(f"predictor_blocks.{i}.mlp.fc1", 4 * width, width)
        linear(f"predictor_blocks.{i}.mlp.fc2", width, 4 * width)
        for norm in ("norm1", "norm2"):
            out |= {f"module.predictor_blocks.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    out |= {f"module.predictor_norm.{part}": (width,) for part in ("weight", "bias")}
    linear("predictor_proj", encoder, width)
    return out
