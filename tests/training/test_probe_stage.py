"""A probe stage from its start to evaluation.json, against plain code, chance and itself."""

import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.metrics import accuracy_score

from tests.chain import checkpoint_tensors, metrics
from tests.processes import run_processes
from tests.training.probe_material import (
    CLASSES,
    FIRST_LR,
    checkpoint,
    killed_before_the_result,
    labels_in,
    make_colours,
    plain_views,
    probe_recipe,
    probe_stage,
    probe_stage_of_few_features,
    result,
    stopped_after_a_step,
)
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.evaluation import evaluation_clips
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.eval.attentive_probe import table
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.model.probe import AttentiveProbe
from vjepa_scale.monitor.stage_files import StageFiles
from vjepa_scale.recipe import Recipe, stages_of
from vjepa_scale.training.preflight import is_finished, preflight

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Sets = dict[str, Path]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    return make_colours(tmp_path_factory.mktemp("colours"))


LIMITS = {"labels_per_class": 3, "choose_per_class": 2}
CLIPPED: dict[str, Any] = {"optimizer": {"clip_grad_norm": 0.5}}
LEARNT: dict[str, Any] = {"steps": 30, "phases": [{"name": "decay", "start_lr": 1e-2, "final_lr": 0}]}


@pytest.fixture(scope="module")
def runs(sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """Finished stages of one rank, all by one process: to start one takes longer than a stage."""
    folder = tmp_path_factory.mktemp("runs")
    probes: dict[str, dict[str, Any]] = {
        "plain": {},  # all labels, two settings
        "first alone": {"lr_scales": [1]},
        "second alone": {"lr_scales": [0.1]},
        "clipped": {**CLIPPED, "lr_scales": [1, 1e30]},  # the second diverges at its first step
        "clipped, first alone": {**CLIPPED, "lr_scales": [1]},
        "few": LIMITS,
        "few, others damaged": LIMITS,
        "choice": {"choose_per_class": 4},
        "choice, other clips": {"choose_per_class": 4, "evaluate_on": "shuffled_held_out"},
        "draws": {"labels_per_class": 2, "label_draws": 3, "choose_per_class": 4},
        "views": {
            **LEARNT,
            "labels_per_class": 4,
            "choose_per_class": 5,
            "views": {"segments": 2, "crops": 3},
        },
        "shuffled": {**LEARNT, "train": "shuffled_train", "evaluate_on": "shuffled_held_out"},
    }
    shutil.copytree(sets["train"], folder / "damaged")
    recipes = {
        name: probe_recipe(
            folder / name, {**sets, "train": folder / "damaged"} if name.endswith("damaged") else sets, **probe
        )
        for name, probe in probes.items()
    }
    _damage(folder / "damaged", _others(recipes["few"]))
    run_processes(probe_stage, 1, list(recipes.values()))
    return recipes


@pytest.fixture(scope="module")
def probed(runs: dict[str, Recipe]) -> Recipe:
    return runs["plain"]


def _others(recipe: Recipe) -> list[int]:
    """The records of the training set that are neither trained nor chosen on."""
    manifest = Manifest.open(recipe.data.sets["train"].path)
    stage = stages_of(recipe)["probe"]
    trained, chosen = stage._few(manifest, per_class=3), stage.choice_records(manifest)
    assert (len(trained), len(chosen)) == (9, 6)
    assert not set(trained) & set(chosen)
    return sorted(set(range(manifest.records)) - {*trained.tolist(), *chosen.tolist()})


def test_the_result_says_what_was_done(probed: Recipe) -> None:
    found = result(probed)
    assert found["origin"] == {"init_from": "untrained"}
    assert (found["step"], found["evaluated_on"], found["labels_per_class"]) == (6, "held_out", None)
    assert sorted(found["class_names"]) == sorted(CLASSES)
    assert (found["clips"], found["classes"], found["chance"], found["majority"]) == (21, 3, 1 / 3, 1 / 3)
    assert found["trained_on"] == {"train": 60}
    assert found["views"] == {"segments": 1, "crops": 1}
    assert [(s["lr"], s["weight_decay"]) for s in found["settings"]] == [(FIRST_LR, 0.05), (FIRST_LR / 10, 0.05)]
    assert found["chosen_on"] == "evaluate_on"
    assert found["best"]["accuracy"] == max(s["accuracy"] for s in found["settings"])
    assert is_finished(stages_of(probed)["probe"])
    assert StageFiles(stages_of(probed)["probe"]).finished


@pytest.mark.parametrize(("name", "lefts"), [("plain", [4]), ("views", [0, 4, 8] * 2)])
def test_accuracy_is_that_of_plain_code_on_the_checkpoint(
    name: str, lefts: list[int], runs: dict[str, Recipe], tmp_path: Path
) -> None:
    """Tensors by PyTorch's converter, pixels by FFmpeg and torch, labels from the records' JSON. Of pictures of 24 × 32
    pixels the crops begin at these columns; the segments of a picture are all the same."""
    recipe = runs[name]
    tensors = checkpoint_tensors(checkpoint(recipe), tmp_path)
    encoder = Encoder(recipe.model).eval()
    encoder.load_state_dict(_of(tensors, "encoder"))
    manifest = Manifest.open(recipe.data.sets["held_out"].path)
    clips = plain_views(recipe, manifest, range(manifest.records), tmp_path, lefts=lefts)
    labels = labels_in(manifest.folder, result(recipe)["class_names"])
    with torch.no_grad():
        tokens = encoder(clips)
        for setting in result(recipe)["settings"]:
            probe = AttentiveProbe(width=32, heads=2, classes=3, depth=2, eps=1e-6)
            probe.load_state_dict(_of(tensors, setting["probe"]))
            probabilities = probe(tokens).softmax(1).reshape(len(labels), len(lefts), 3).mean(1)
            expected = accuracy_score(labels, probabilities.argmax(1))
            assert setting["accuracy"] == pytest.approx(expected, abs=1e-12)
            assert expected > 0  # not the accuracy of a broken pipe


def test_the_encoder_is_bit_identical_before_and_after(probed: Recipe, tmp_path: Path) -> None:
    after = _of(checkpoint_tensors(checkpoint(probed), tmp_path), "encoder")
    before = Encoder(probed.model)
    initialise(before, seed=probed.run.seed, prefix="encoder")
    assert before.state_dict().keys() == after.keys()
    for name, value in before.state_dict().items():
        assert torch.equal(value, after[name]), name
    assert not any("exp_avg.encoder" in name for name in checkpoint_tensors(checkpoint(probed), tmp_path))


def test_ranks_and_batches_do_not_change_the_result(probed: Recipe, tmp_path: Path) -> None:
    """The same weights, evaluated by two ranks in batches of 4 and by one in batches of 1: 21 clips each."""
    expected = result(probed)
    for ranks, micro_batch in ((2, 4), (1, 1)):
        shutil.copytree(probed.run.dir, tmp_path / f"{ranks}")
        again = _with(probed, run={"dir": str(tmp_path / f"{ranks}")}, probe={"micro_batch": micro_batch})
        (tmp_path / f"{ranks}" / "probe" / "evaluation.json").unlink()
        assert not is_finished(stages_of(again)["probe"])
        assert not StageFiles(stages_of(again)["probe"]).finished
        run_processes(probe_stage, ranks, [again])
        found = result(again)
        assert found == expected
        assert len(metrics(Path(again.run.dir), "probe")) == 6  # nothing was trained again


def test_draws_of_labels_have_probes_and_figures_of_their_own(runs: dict[str, Recipe], tmp_path: Path) -> None:
    recipe = runs["draws"]
    found = result(recipe)
    assert (found["label_draws"], found["labels_per_class"], found["trained_on"]) == (3, 2, {"train": 18})
    assert [(s["probe"], s["draw"], s["lr"]) for s in found["settings"]] == [
        (f"probe_{n:02d}", n // 2, FIRST_LR / (1, 10)[n % 2]) for n in range(6)
    ]
    best = [max(found["settings"][2 * d : 2 * d + 2], key=lambda s: s["choice_accuracy"]) for d in range(3)]
    assert found["best"] == best[0]
    accuracies = [setting["accuracy"] for setting in best]
    assert found["accuracy"]["draws"] == accuracies
    assert found["accuracy"]["mean"] == pytest.approx(statistics.mean(accuracies), abs=1e-12)
    assert found["accuracy"]["std"] == pytest.approx(statistics.stdev(accuracies), abs=1e-12)
    for measure in ("knn", "linear"):
        assert found[measure] == pytest.approx(statistics.mean(found[f"{measure}_draws"]["draws"]), abs=1e-12)
    # No record is in two draws, nor in one and among those to choose on; each draw has two of each class.
    manifest = Manifest.open(recipe.data.sets["train"].path)
    draws = [stages_of(recipe)["probe"].records_of_draw(manifest, draw).tolist() for draw in range(3)]
    chosen_on = stages_of(recipe)["probe"].choice_records(manifest).tolist()
    assert len({*draws[0], *draws[1], *draws[2], *chosen_on}) == 6 + 6 + 6 + 12
    labels = labels_in(manifest.folder, found["class_names"])
    assert all(np.bincount(labels[draw]).tolist() == [2, 2, 2] for draw in draws)
    assert "over 3 draws of labels" in "\n".join(table(found))
    # Equal starts, other clips: probes of one setting and two draws have come apart.
    tensors = checkpoint_tensors(checkpoint(recipe), tmp_path)
    assert not torch.equal(_of(tensors, "probe_00")["linear.weight"], _of(tensors, "probe_02")["linear.weight"])


def test_few_labels_learn_colours(runs: dict[str, Recipe]) -> None:
    """Four labels of each class, six views: pictures of a colour are told apart by all readings."""
    found = result(runs["views"])
    assert found["views"] == {"segments": 2, "crops": 3}
    assert found["trained_on"] == {"train": 12}
    assert (found["chosen_on"], found["choice_clips"]) == ("choose_per_class", 15)
    assert max(s["choice_accuracy"] for s in found["settings"]) == found["best"]["choice_accuracy"]
    floor = binom.isf(1e-5, found["clips"], 1 / 3) / found["clips"]  # at chance, more than these are right once in 1e5
    for reading in (found["best"]["accuracy"], found["knn"], found["linear"]):
        assert reading > floor


def test_shuffled_labels_are_at_chance(runs: dict[str, Recipe]) -> None:
    """Held-out labels are uniform draws: each reading is right on Binomial(21, 1/3) clips. Bound: 1e-4 on each side."""
    found = result(runs["shuffled"])
    low, high = binom.ppf(1e-4, 21, 1 / 3), binom.isf(1e-4, 21, 1 / 3)
    for reading in (*(s["accuracy"] for s in found["settings"]), found["knn"], found["linear"]):
        assert low <= round(21 * reading) <= high


def test_settings_trained_together_are_each_as_alone(runs: dict[str, Recipe], tmp_path: Path) -> None:
    tensors = checkpoint_tensors(checkpoint(runs["plain"]), tmp_path)
    for name, single in (("probe_00", runs["first alone"]), ("probe_01", runs["second alone"])):
        (tmp_path / name).mkdir()
        expected = _of(checkpoint_tensors(checkpoint(single), tmp_path / name), "probe_00")
        found = _of(tensors, name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert float((found[key] - value).norm()) <= 1e-6 * float(value.norm()), key
    first, second = _of(tensors, "probe_00"), _of(tensors, "probe_01")
    assert not torch.equal(first["linear.weight"], second["linear.weight"])


def test_a_setting_that_diverges_is_lost_alone(runs: dict[str, Recipe], tmp_path: Path) -> None:
    together, alone = (checkpoint_tensors(checkpoint(runs[name]), _made(tmp_path / name[-1])) for name in _CLIPPED)
    expected = _of(alone, "probe_00")
    for key, value in expected.items():
        assert float((_of(together, "probe_00")[key] - value).norm()) <= 1e-6 * float(value.norm()), key
    rows, lonely = (metrics(Path(runs[name].run.dir), "probe") for name in _CLIPPED)
    assert [row["best_loss"] for row in rows] == pytest.approx([row["best_loss"] for row in lonely], rel=1e-6)
    assert all(row["grad_norm"] > 0.5 for row in lonely)  # it was clipped
    first, second = result(runs["clipped"])["settings"]
    assert (first["finite"], second["finite"]) == (True, False)
    assert second["accuracy"] == 0
    assert result(runs["clipped"])["best"] == first == result(runs["clipped, first alone"])["best"]
    assert "outputs not finite" in "\n".join(table(result(runs["clipped"])))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_setting_that_diverges_is_lost_alone_under_zero(runs: dict[str, Recipe], stage: int, tmp_path: Path) -> None:
    engine = {**runs["clipped"].engine.model_dump(mode="json"), "kind": "deepspeed", "zero_stage": stage}
    recipe = _with(runs["clipped"], run={"dir": str(tmp_path / "run")}, engine=engine)
    run_processes(probe_stage, 2, [recipe])
    first, second = result(recipe)["settings"]
    assert (first["finite"], second["finite"]) == (True, False)
    rows, lonely = (metrics(Path(run), "probe") for run in (recipe.run.dir, runs["clipped, first alone"].run.dir))
    # Two ranks' sums are in another order; a diverged neighbour's gradient would change the third digit.
    assert [row["best_loss"] for row in rows] == pytest.approx([row["best_loss"] for row in lonely], rel=1e-5)


_CLIPPED = ("clipped", "clipped, first alone")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_other_records_are_never_looked_at(runs: dict[str, Recipe]) -> None:
    """The pictures of all records but those that are trained or chosen on cannot be decoded: nothing changes."""
    whole, damaged = runs["few"], runs["few, others damaged"]
    assert len(_others(damaged)) == 60 - 9 - 6
    manifest = Manifest.open(damaged.data.sets["train"].path)
    clips = evaluation_clips(manifest, frames=2, size=(16, 16), fps=4, batch=1, records=_others(damaged)[:1])
    with pytest.raises(UserError, match="cannot be decoded"):
        next(clips)
    assert result(damaged) == result(whole)
    assert metrics(Path(damaged.run.dir), "probe") == metrics(Path(whole.run.dir), "probe")
    assert (Path(damaged.run.dir) / "ledger.jsonl").read_text() == ""


def test_the_choice_never_touches_the_evaluated_clips(runs: dict[str, Recipe]) -> None:
    """With other pictures and labels to evaluate on, the same setting is best, by the same figures."""
    found, again = result(runs["choice"]), result(runs["choice, other clips"])
    assert found["trained_on"] == {"train": 60 - 12}  # without labels_per_class, on all but these
    assert [s["choice_accuracy"] for s in found["settings"]] == [s["choice_accuracy"] for s in again["settings"]]
    assert found["best"]["probe"] == again["best"]["probe"]
    assert [s["accuracy"] for s in found["settings"]] != [s["accuracy"] for s in again["settings"]]


def test_an_undecodable_clip_is_named_and_nothing_is_written(probed: Recipe, sets: Sets, tmp_path: Path) -> None:
    shutil.copytree(sets["held_out"], tmp_path / "damaged")
    shutil.copytree(probed.run.dir, tmp_path / "run")
    (tmp_path / "run" / "probe" / "evaluation.json").unlink()
    _damage(tmp_path / "damaged", [17])
    tree = {"sets": {"train": {"path": str(sets["train"])}, "held_out": {"path": str(tmp_path / "damaged")}}}
    recipe = _with(probed, run={"dir": str(tmp_path / "run")}, data=tree)
    key = Manifest.open(tmp_path / "damaged").key(17)
    with pytest.raises(AssertionError, match=rf"UserError: .*damaged.*record {key} cannot be decoded"):
        run_processes(probe_stage, 1, [recipe])
    assert not list((tmp_path / "run" / "probe").glob("*evaluation*"))
    assert not is_finished(stages_of(recipe)["probe"])


def test_of_many_labelled_clips_no_features_are_kept(probed: Recipe, tmp_path: Path) -> None:
    recipe = trained_only(probed, tmp_path / "run")
    run_processes(probe_stage_of_few_features, 1, recipe)
    expected = {
        **result(probed),
        **dict.fromkeys(("knn", "linear", "knn_draws", "linear_draws", "neighbours")),
    }
    assert result(recipe) == expected
    assert list(table(result(recipe)))[-1].startswith("chance 33.3% (no k-NN")


@pytest.mark.fault(
    "processes",
    "a probe stage is killed after its last step, before its result",
    "the same command evaluates, without training again",
)
def test_killed_before_the_result_the_next_start_evaluates(probed: Recipe, sets: Sets, tmp_path: Path) -> None:
    recipe = probe_recipe(tmp_path, sets)
    with pytest.raises(AssertionError, match="died without a word"):
        run_processes(killed_before_the_result, 1, recipe)
    assert checkpoint(recipe).name == "step_00000006"
    assert not is_finished(stages_of(recipe)["probe"])
    run_processes(probe_stage, 1, [recipe])
    assert result(recipe) == result(probed)


def test_a_stage_that_was_stopped_goes_on_as_if_it_had_not(probed: Recipe, sets: Sets, tmp_path: Path) -> None:
    recipe = probe_recipe(tmp_path, sets)
    run_processes(stopped_after_a_step, 2, recipe)
    assert checkpoint(recipe).name == "step_00000001"
    run_processes(probe_stage, 1, [recipe])
    ours, theirs = metrics(tmp_path, "probe"), metrics(Path(probed.run.dir), "probe")
    for key in ("loss", "best_loss", "grad_norm"):  # the first step was of two ranks
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-5)
    assert result(recipe) == result(probed)


def test_a_stop_in_the_evaluation_is_obeyed_and_a_longer_stage_evaluated_again(probed: Recipe, tmp_path: Path) -> None:
    recipe = trained_only(probed, tmp_path / "run")
    run_processes(stopped_after_a_step, 2, recipe)
    assert not (tmp_path / "run" / "probe" / "evaluation.json").exists()
    run_processes(probe_stage, 1, [recipe])
    assert result(recipe) == result(probed)

    more = [{"name": "decay", "start_lr": FIRST_LR, "final_lr": 0, "steps": 6}, {"name": "more", "start_lr": 1e-4}]
    longer = _with(recipe, probe={"steps": 8, "phases": more})
    assert not is_finished(stages_of(longer)["probe"])
    run_processes(probe_stage, 1, [longer])
    assert result(longer)["step"] == 8


@pytest.mark.parametrize(
    ("probe", "sentence"),
    [
        ({"labels_per_class": 15, "choose_per_class": 6}, "20 examples, fewer than 21"),
        ({"choose_per_class": 21}, "^[^:]+: class '[a-z]+' has 20 examples, fewer than 21"),
        ({"evaluate_on": "others"}, "class 'yellow' is not among the 3 classes"),
        ({"evaluate_on": "train_again"}, "the same shards as data.sets.train_again"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(
    probe: dict[str, object], sentence: str, sets: Sets, tmp_path: Path
) -> None:
    others = _yellow(tmp_path)
    recipe = probe_recipe(tmp_path / "run", {**sets, "others": others, "train_again": sets["train"]}, **probe)
    with pytest.raises(UserError, match=sentence):
        preflight(stages_of(recipe)["probe"], will_have_run=set())


def _yellow(folder: Path) -> Path:
    from tests.videos import quiet, still_image
    from vjepa_scale.shards.make import Settings, make_shards

    (folder / "others" / "yellow").mkdir(parents=True)
    (folder / "others" / "yellow" / "0.png").write_bytes(still_image(0, codec="png"))
    make_shards(folder / "others", folder / "others-shards", Settings(images=True), workers=1, progress=quiet)
    return folder / "others-shards"


def trained_only(probed: Recipe, run_dir: Path) -> Recipe:
    """A copy of the run whose probes are not evaluated yet."""
    shutil.copytree(probed.run.dir, run_dir)
    (run_dir / "probe" / "evaluation.json").unlink()
    return _with(probed, run={"dir": str(run_dir)})


def _with(recipe: Recipe, **sections: dict[str, object]) -> Recipe:
    """The recipe with some keys changed."""
    from vjepa_scale.recipe.load import validate_recipe

    tree = recipe.model_dump(mode="json", exclude_none=True)
    for section, values in sections.items():
        tree[section] = {**tree[section], **values}
    return validate_recipe(tree, source="test")


def _of(tensors: dict[str, torch.Tensor], network: str) -> dict[str, torch.Tensor]:
    """One network's tensors, by its own names."""
    return {name.removeprefix(f"{network}."): v for name, v in tensors.items() if name.startswith(f"{network}.")}


def _damage(shards: Path, records: list[int]) -> None:
    """Zeros in place of the pictures' bytes."""
    manifest = Manifest.open(shards)
    for record in records:
        data = manifest.read(record)
        path = shards / manifest.shard_of(record).name
        content = path.read_bytes()
        assert content.count(data) == 1
        path.write_bytes(content.replace(data, bytes(len(data))))
