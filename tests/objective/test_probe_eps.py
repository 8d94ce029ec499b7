"""``probe.eps``: by default what Hugging Face's classifier can hold, and in a run of an earlier version what it was."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tests.training.probe_material import probe_recipe
from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.core.errors import UserError
from vjepa_scale.launch.plan import describe
from vjepa_scale.model.probe import probe_of
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.recipe.load import recipe_yaml
from vjepa_scale.training.planned_start import load_for_training
from vjepa_scale.training.preflight import refuse_other_recipe

SAVES_ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def written(folder: Path, **probe: object) -> Path:
    """A recipe of a probe stage, on an encoder of 2 heads, that says no eps unless it is given."""
    sets = {name: folder / name for name in ("train", "held_out")}
    path = folder / "recipe.yaml"
    path.write_text(recipe_yaml(probe_recipe(folder / "run", sets, **probe)))
    return path


@pytest.mark.parametrize(
    ("probe", "eps", "warned"),
    [
        ({"heads": 2}, 1e-6, None),
        ({"heads": 4}, 1e-5, "heads 4, theirs as many as the encoder: 2; eps 1e-05, theirs 1e-06 (before training: "),
        ({"heads": 2, "eps": 1e-5}, 1e-5, "eps 1e-05, theirs 1e-06 (before training: probe.eps=1e-06)"),
        ({"heads": 4, "eps": 1e-6}, 1e-6, "heads 4, theirs as many as the encoder: 2 (before training: probe.heads=2)"),
    ],
)
def test_what_can_be_exported_is_the_default_and_the_rest_is_warned_of(
    probe: dict[str, float], eps: float, warned: str | None, tmp_path: Path
) -> None:
    recipe = load_recipe(written(tmp_path, **probe))
    stage = stages_of(recipe)["probe"]
    network = probe_of(recipe.model, stage.config, classes=3)
    assert {part.eps for part in network.modules() if isinstance(part, nn.LayerNorm)} == {eps}
    found = [line for line in describe([stage], where="here") if "warning" in line]
    assert len(found) == (warned is not None)
    if warned is not None:
        assert "cannot be exported as VJEPA2ForVideoClassification: " + warned in found[0]


@SAVES_ALONE
def test_a_run_that_has_begun_keeps_its_eps(tmp_path: Path) -> None:
    """The recipe that an earlier version recorded has its default written out: 1e-5."""
    path = written(tmp_path, heads=2)
    assert stages_of(load_for_training(path))["probe"].config.eps is None
    recorded = load_recipe(path, ["probe.eps=1e-5"]).model_dump(mode="json", exclude_none=True)
    launched = tmp_path / "run" / "recipe.yaml"
    launched.parent.mkdir()
    launched.write_text(yaml.safe_dump(recorded))  # a launch whose probes have not begun yet
    assert stages_of(load_for_training(path))["probe"].config.eps == 1e-5
    launched.unlink()
    folder = tmp_path / "run" / "probe" / "checkpoints"
    own = store.save(folder, 2, {"a": torch.ones(1)}, {"recipe": recorded, "stage": "probe", "first": 0})
    stage = stages_of(load_for_training(path))["probe"]
    assert stage.config.eps == 1e-5
    refuse_other_recipe(stage, own)
    given = stages_of(load_for_training(path, ["probe.eps=1e-6"]))["probe"]
    with pytest.raises(UserError, match=r"probe\.eps: 1e-05 then, 1e-06 now"):
        refuse_other_recipe(given, own)


@SAVES_ALONE
def test_a_default_and_the_same_number_written_out_are_one_recipe(tmp_path: Path) -> None:
    path = written(tmp_path, heads=2)
    recorded = load_recipe(path).model_dump(mode="json", exclude_none=True)
    own = store.save(tmp_path, 2, {"a": torch.ones(1)}, {"recipe": recorded, "stage": "probe", "first": 0})
    refuse_other_recipe(stages_of(load_for_training(path, ["probe.eps=1e-6"]))["probe"], own)


def test_one_process_reads_a_checkpoint_without_a_warning(tmp_path: Path) -> None:
    """DCP has one for each call: an export, which reads tensor by tensor, gave as many as the encoder has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = store.save(tmp_path, 1, {"a": torch.ones(2)}, {})
    tensors = {"a": torch.zeros(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CheckpointReader(saved).fill(tensors, alone=True)
    assert torch.equal(tensors["a"], torch.ones(2))
