"""Stages that start from weights of other formats: Hugging Face's, and a file that the published code wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.chain import RECIPE, ROOT, checkpoint_tensors, launch, metrics, tool, write_recipe
from tests.model.published import our_weights, random_published
from tests.published import inputs
from tests.published.results import MODEL as PUBLISHED_MODEL
from tests.published.results import checkpoint as published_networks
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig

Sets = dict[str, Path]
PUBLISHED = ROOT / "tests" / "published" / "checkpoint.pt"
MODEL = ModelConfig(
    encoder=EncoderConfig(width=48, depth=2, heads=2),
    predictor=PredictorConfig(width=24, depth=2, heads=2, mlp_hidden=96, mask_tokens=2),
    patch=8,
)
# One step that moves nothing: what is saved is what was loaded.
STILL: dict[str, Any] = {"steps": 1, "phases": [{"name": "still", "start_lr": 0}]}
AS_PUBLISHED: dict[str, Any] = {
    "model": PUBLISHED_MODEL.model_dump(mode="json"),
    "jepa": {"ema_momentum": 1, "mask_token": "first"},
    "masks": {"group": 4, "generators": [{"blocks": 2, "spatial_scale": 0.15}, {"blocks": 1, "spatial_scale": 0.3}]},
    "cooldown": None,
}


def stage(**start: Any) -> dict[str, Any]:
    return {**RECIPE["pretrain"], **STILL, **start}


def saved(run: Path, step: int, scratch: Path) -> dict[str, Tensor]:
    return checkpoint_tensors(run / "pretrain" / "checkpoints" / f"step_{step:08d}", scratch)


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder that transformers wrote, and its weights by our names (the tests' own map)."""
    model = random_published(MODEL, crop=32, frames=4, seed=1)
    model.save_pretrained(tmp_path / "theirs")
    encoder, predictor = our_weights(model)
    weights = {f"encoder.{name}": value for name, value in encoder.items()}
    return tmp_path / "theirs", weights | {f"predictor.{name}": value for name, value in predictor.items()}


def test_init_from_hugging_face(theirs: tuple[Path, dict[str, Tensor]], two_data_sets: Sets, tmp_path: Path) -> None:
    folder, weights = theirs
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "run",
        two_data_sets,
        model=MODEL.model_dump(mode="json"),
        launch={"tasks_per_node": 2},
        jepa={"ema_momentum": 1},
        pretrain=stage(init_from=str(folder)),
        cooldown=None,
    )
    said = launch(recipe).stdout
    assert f"{len(weights)} tensors match, 0 missing, 0 unexpected, 0 of another shape" in said
    found = saved(tmp_path / "run", 1, tmp_path)
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
        if name.startswith("encoder."):
            assert torch.equal(found[f"target_{name}"], value), name


@pytest.mark.slow
def test_continue_from_a_published_file(two_data_sets: Sets, tmp_path: Path) -> None:
    """Weights of three networks, and AdamW's moments under the names of their parameters: with a rate of 0 and no
    gradient through the loss's exponent they would stay; here they decay by β and take one gradient."""
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "run",
        two_data_sets,
        launch={"tasks_per_node": 2},
        # β = 1 would keep the moments; the largest below it moves them by less than the tolerance
        optimizer={"betas": [1 - 1e-12, 1 - 1e-12]},
        pretrain=stage(
            continue_from=str(PUBLISHED), clip={"frames": inputs.FRAMES, "size": inputs.SIZE}, micro_batch=2
        ),
        **AS_PUBLISHED,
    )
    said = launch(recipe).stdout
    assert f"continue from {PUBLISHED} at step {inputs.STEPS}" in said
    found = saved(tmp_path / "run", inputs.STEPS + 1, tmp_path)
    networks = published_networks()
    for network, weights in networks.items():
        for name, value in weights.items():
            assert torch.equal(found[f"{network}.{name}"], value), f"{network}.{name}"
    state = torch.load(PUBLISHED, weights_only=True)["opt"]["state"]
    for index, name in enumerate(published_order(networks)):
        for moment in ("exp_avg", "exp_avg_sq"):
            wanted = state[index][moment] if index in state else torch.zeros_like(found[name])
            torch.testing.assert_close(found[f"optimizer.{moment}.{name}"], wanted, rtol=1e-6, atol=1e-9)
    manifest = json.loads(
        (tmp_path / "run/pretrain/checkpoints" / f"step_{inputs.STEPS + 1:08d}" / "manifest.json").read_text()
    )
    assert manifest["optimizer_steps"] == inputs.STEPS + 1
    assert [row["step"] for row in metrics(tmp_path / "run", "pretrain")] == [inputs.STEPS]


def published_order(networks: dict[str, dict[str, Tensor]]) -> list[str]:
    """Their optimiser's: encoder and predictor with weight decay, then without, each as its module lists them."""
    return [
        f"{network}.{name}"
        for decayed in (True, False)
        for network in ("encoder", "predictor")
        for name, value in networks[network].items()
        if ("bias" not in name and value.ndim != 1) == decayed
    ]


@pytest.mark.slow
def test_an_encoder_alone_needs_permission(
    theirs: tuple[Path, dict[str, Tensor]], two_data_sets: Sets, tmp_path: Path
) -> None:
    """A published file without a predictor: refused, unless the recipe names what may start fresh."""
    networks = torch.load(PUBLISHED, weights_only=True)
    torch.save({"encoder": networks["encoder"]}, tmp_path / "encoder.pt")

    def recipe(**more: Any) -> Path:
        clip = {"frames": inputs.FRAMES, "size": inputs.SIZE}
        start = stage(init_from=str(tmp_path / "encoder.pt"), clip=clip, micro_batch=2, **more)
        return write_recipe(tmp_path / "r.yaml", tmp_path / "run", two_data_sets, pretrain=start, **AS_PUBLISHED)

    refused = launch(recipe(), check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "pretrain.init_from" in refused.stderr
    assert "it holds no predictor" in refused.stderr
    assert not (tmp_path / "run" / "pretrain").exists()

    launch(recipe(init_without=["predictor"]))
    found = saved(tmp_path / "run", 1, tmp_path)
    for name, value in published_networks()["encoder"].items():
        assert torch.equal(found[f"encoder.{name}"], value), name
    assert abs(float(found["predictor.predictor_embed.weight"].std()) / 0.02 - 1) < 0.1  # fresh: std 0.02


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.encoder": "{width: 48, depth: 3, heads: 2}"}, "2 blocks in the file, 3 in the recipe"),
        ({"model.encoder": "{width: 48, depth: 2, heads: 4}"}, "2 heads in the file, 4 in the recipe"),
        ({"model.rope.layout": "interleaved"}, "rope.layout tiled in the file, interleaved in the recipe"),
        ({"pretrain.init_from": "null", "pretrain.continue_from": "THEIRS"}, "it holds no optimiser state"),
        ({"pretrain.init_from": "nowhere"}, "nowhere: no such file or folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    change: dict[str, str], said: str, theirs: tuple[Path, dict[str, Tensor]], two_data_sets: Sets, tmp_path: Path
) -> None:
    model = MODEL.model_dump(mode="json")
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "run",
        two_data_sets,
        model=model,
        pretrain=stage(init_from=str(theirs[0])),
        cooldown=None,
    )
    words = [f"{key}={value.replace('THEIRS', str(theirs[0]))}" for key, value in change.items()]
    refused = launch(recipe, *words, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert said in refused.stderr
    assert "pretrain." in refused.stderr
    assert not (tmp_path / "run" / "pretrain").exists()


@pytest.mark.slow
def test_weights_of_another_model_of_the_same_shapes(two_data_sets: Sets, tmp_path: Path) -> None:
    """Heads and positions have no tensors: our own checkpoints too are compared with the recipe's model."""
    recipe = write_recipe(tmp_path / "a.yaml", tmp_path / "a", two_data_sets, pretrain=stage(), cooldown=None)
    launch(recipe)
    for word in ("init_from", "continue_from"):
        other = write_recipe(
            tmp_path / "b.yaml",
            tmp_path / "b",
            two_data_sets,
            model={"encoder": {"width": 48, "depth": 2, "heads": 4}, "rope": {"layout": "interleaved"}},
            pretrain=stage(**{word: str(tmp_path / "a" / "pretrain")}),
            cooldown=None,
        )
        refused = launch(other, check=False)
        assert refused.returncode == 2
        assert f"pretrain.{word}" in refused.stderr
        assert "2 heads in the file, 4 in the recipe" in refused.stderr
        assert "rope.layout tiled in the file, interleaved in the recipe" in refused.stderr


@pytest.mark.slow
def test_a_cooldown_after_a_stage_that_began_elsewhere(two_data_sets: Sets, tmp_path: Path) -> None:
    """Steps are counted from the checkpoint of another run, over both stages and a second launch."""
    first = write_recipe(tmp_path / "a.yaml", tmp_path / "a", two_data_sets, cooldown=None)
    launch(first, "pretrain.steps=6")
    start = {**RECIPE["pretrain"], "steps": 5, "continue_from": str(tmp_path / "a" / "pretrain")}
    start["phases"] = [{"name": "more", "start_lr": 1e-4}]
    cooldown = {**RECIPE["cooldown"], "phases": [{"name": "still", "start_lr": 1e-5}]}
    recipe = write_recipe(tmp_path / "b.yaml", tmp_path / "b", two_data_sets, pretrain=start, cooldown=cooldown)
    planned = json.loads(tool("launch", "status", tmp_path / "a", "--json").stdout)
    assert planned["stages"][0]["last_step"] == 6
    launch(recipe)
    assert [row["step"] for row in metrics(tmp_path / "b", "pretrain")] == list(range(6, 11))
    assert [row["step"] for row in metrics(tmp_path / "b", "cooldown")] == list(range(11, 17))
    launch(recipe, "cooldown.steps=8")  # resumes inside a stage that continues from that one
    assert [row["step"] for row in metrics(tmp_path / "b", "cooldown")] == list(range(11, 19))


SMALL = ("launch.cluster=local", "launch.nodes=1", "launch.tasks_per_node=1", "engine.device=cpu", "data.workers=1")
SMALL += ("engine.precision=float32", "model.encoder={width: 48, depth: 2, heads: 2}", "checkpoint.every=1000")
SMALL += ("model.predictor={width: 24, depth: 1, heads: 2}", "masks.group=8", "pretrain.steps=40")
SMALL += ("pretrain.global_batch=8", "pretrain.micro_batch=8", "pretrain.phases.0.steps=10", "data.lanes=2")
SMALL += ("pretrain.phases.0.final_lr=3e-3", "jepa.ema_momentum=0.95")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        ("vjepa1_vitl", ("model.patch=8", "pretrain.clip={frames: 4, size: 48}", "model.sincos={frames: 4, size: 40}")),
        ("ijepa_vith", ("model.patch=8", "pretrain.clip={frames: 1, size: 48}", "model.sincos={frames: 1, size: 48}")),
    ],
)
def test_recipes_with_sine_cosine_positions_train(
    name: str, geometry: tuple[str, ...], two_data_sets: Sets, tmp_path: Path
) -> None:
    """The shipped recipe, made small: the loss falls, and its positions travel with what is exported."""
    sets = [f"data.sets.{old}=null" for old in ("kinetics710", "ssv2", "howto100m", "imagenet")]
    sets = [word for word in sets if (name == "ijepa_vith") == ("imagenet" in word)]
    words = [*SMALL, *geometry, *sets, f"data.sets.mine.path={two_data_sets['left']}", f"run.dir={tmp_path / 'run'}"]
    launch(ROOT / "recipes" / f"{name}.yaml", *words)
    losses = [row["loss"] for row in metrics(tmp_path / "run", "pretrain")]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    tool("consolidate", tmp_path / "run", "--to", "safetensors", "--out", tmp_path / "weights")
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["model"]["positions"] == "sincos"
