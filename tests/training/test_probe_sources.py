"""What a probe stage can start from: every kind of weights gives the same probes, and says where it came from."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import VJEPA2ForVideoClassification

from tests.chain import RECIPE, checkpoint_tensors, launch, tool, write_recipe
from tests.processes import run_processes
from tests.training.probe_material import checkpoint, probe_stage, result
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.probe import AttentiveProbe
from vjepa_scale.recipe import load_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROBE: dict[str, Any] = {
    "steps": 2,
    "mixture": {"left": 1},
    "evaluate_on": "right",
    "clip": {"frames": 4, "size": 32},
    "depth": 2,
    "heads": 2,
    "lr_scales": [1, 0.1],
    "weight_decays": [0.01],
    "global_batch": 4,
    "micro_batch": 4,
    "phases": [{"name": "constant", "start_lr": 1e-3}],
}


@pytest.fixture(scope="module")
def pretrained(two_data_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose pretraining, of four steps, has been run; its checkpoints are of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("pretrained")
    stage = {
        **RECIPE["pretrain"],
        "steps": 4,
        "clip": {"frames": 4, "size": 32},
        "phases": [{"name": "constant", "start_lr": 1e-3}],
    }
    recipe = write_recipe(
        folder / "recipe.yaml",
        folder / "run",
        two_data_sets,
        masks={"generators": [{"blocks": 2, "spatial_scale": 0.3}]},
        model={
            **RECIPE["model"],
            "rope": {"layout": "tiled"},
            "predictor": {**RECIPE["model"]["predictor"], "mask_tokens": 1},
        },
        checkpoint={"every": 2},
        pretrain=stage,
        cooldown=None,
        probe={"init_from": "pretrain", **PROBE},
    )
    launch(recipe, "--stages", "pretrain")
    return recipe


def test_a_checkpoint_in_the_middle_as_a_job_of_its_own(pretrained: Path, tmp_path: Path) -> None:
    """The command of docs/probe.md; the encoder is that checkpoint's target encoder, to the bit."""
    run = pretrained.parent / "run"
    middle = run / "pretrain" / "checkpoints" / "step_00000002"
    command = (pretrained, "--stages", "probe", f"probe.init_from={middle}", f"run.dir={tmp_path / 'other'}")
    said = launch(*command).stdout
    assert "5-NN" in said  # the table
    found = json.loads((tmp_path / "other" / "probe" / "evaluation.json").read_text())
    assert found["origin"].pop("identity")
    assert found["origin"] == {"init_from": str(middle), "path": str(middle), "stage": "pretrain", "step": 2}
    pretraining = checkpoint_tensors(middle, tmp_path)
    probing = checkpoint_tensors(tmp_path / "other" / "probe" / "checkpoints" / "step_00000002", tmp_path)
    names = [name for name in probing if name.startswith("encoder.")]
    assert names
    for name in names:
        assert torch.equal(probing[name], pretraining[f"target_{name}"])
    assert any(not torch.equal(probing[name], pretraining[name]) for name in names)  # of two encoders, that one
    assert not (run / "probe").exists()
    assert "already complete" in launch(*command).stdout


def test_the_best_probe_becomes_their_classifier(pretrained: Path, tmp_path: Path) -> None:
    """transformers' logits of a random clip against ours, from the checkpoint's tensors by PyTorch's converter."""
    shutil.copytree(pretrained.parent / "run" / "pretrain", tmp_path / "first" / "pretrain")
    recipe = load_recipe(pretrained, [f"run.dir={tmp_path}", f"probe.init_from={tmp_path}/first/pretrain"])
    run_processes(probe_stage, 1, [recipe])
    # As where the whole run is moved: beside the probe, it is known by its identity.
    (tmp_path / "first" / "pretrain").rename(tmp_path / "away")
    said = tool("consolidate", tmp_path / "probe", "--to", "huggingface", "--out", tmp_path / "theirs", check=False)
    assert said.returncode == 2
    assert "the checkpoint that the probe started from is not there, and not at " in said.stderr
    (tmp_path / "away").rename(tmp_path / "pretrain")
    said = tool("consolidate", tmp_path / "probe", "--to", "huggingface", "--out", tmp_path / "theirs")
    assert re.search(r"^checked against transformers: .*, logits differ by \d", said.stdout, re.MULTILINE)
    theirs = VJEPA2ForVideoClassification.from_pretrained(tmp_path / "theirs").eval()
    found = result(recipe)
    assert list(theirs.config.id2label.values()) == found["class_names"]
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert f"`{found['best']['probe']}`" in card
    assert f"Accuracy: {found['best']['accuracy']:.2%} of {found['clips']} clips" in card
    assert "probe:" in card.partition("## Recipe of the probe")[2]
    tensors = checkpoint_tensors(checkpoint(recipe), tmp_path)
    networks = {
        "encoder": Encoder(recipe.model),
        found["best"]["probe"]: AttentiveProbe(width=48, heads=2, classes=found["classes"], depth=2, eps=1e-6),
    }
    for name, network in networks.items():
        own = {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")}
        network.load_state_dict(own)
    encoder, probe = networks.values()
    clip = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, logits = probe(encoder(clip.transpose(1, 2))), theirs(clip).logits
    assert float((ours - logits).abs().max()) <= 1e-5 * float(ours.abs().max())

    pretrain = tmp_path / "untrained"
    untrained = load_recipe(pretrained, [f"run.dir={pretrain}", "probe.init_from=untrained"])
    run_processes(probe_stage, 1, [untrained])
    said = tool("consolidate", pretrain / "probe", "--to", "huggingface", "--out", tmp_path / "no", check=False)
    assert said.returncode == 2
    assert "its encoder was never trained" in said.stderr
    assert not (tmp_path / "no").exists()


def test_every_format_of_the_same_weights_gives_the_same_figures(pretrained: Path, tmp_path: Path) -> None:
    run = pretrained.parent / "run"
    sources = {"stage": "pretrain", "folder": str(run / "pretrain"), "untrained": "untrained"}
    for kind in ("safetensors", "huggingface", "published"):
        tool("consolidate", run, "--to", kind, "--out", tmp_path / kind)
        sources[kind] = str(tmp_path / kind)
    sources["an encoder alone"] = str(tmp_path / "folder" / "probe")  # the second one's own checkpoint
    recipes = {}
    for name, source in sources.items():
        tree = yaml.safe_load(pretrained.read_text())
        tree["probe"]["init_from"] = source
        path = tmp_path / f"{name}.yaml"
        if name != "stage":
            tree["run"]["dir"] = str(tmp_path / name)
        path.write_text(yaml.safe_dump(tree))
        recipes[name] = load_recipe(path)
    run_processes(probe_stage, 1, list(recipes.values()))
    expected = result(recipes["stage"])
    origin = expected.pop("origin")
    assert origin.pop("identity")
    assert origin == {
        "init_from": "pretrain",
        "path": str(run / "pretrain" / "checkpoints" / "step_00000004"),
        "stage": "pretrain",
        "step": 4,
    }
    for name, source in sources.items():
        found = result(recipes[name])
        assert found.pop("origin")["init_from"] == source
        assert (found == expected) == (name != "untrained"), name
