"""Whole runs through tools/launch.py: the same numbers for any ranks, the cooldown's start, the schedule."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.chain import checkpoint_tensors, launch, metrics, tool, write_recipe
from vjepa_scale.checkpoint import store
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe import load_recipe, stages_of
from vjepa_scale.training.preflight import refuse_other_recipe

pytestmark = pytest.mark.distributed


def told(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "manifest.json").read_text())


def test_metrics_have_every_step_and_the_schedule(finished: Path) -> None:
    rows = metrics(finished, "pretrain") + metrics(finished, "cooldown")
    assert [row["step"] for row in rows] == list(range(18))
    assert [row["phase"] for row in rows] == ["warmup"] * 5 + ["constant"] * 7 + ["decay"] * 6
    warmup = [1e-4 + 9e-4 * (s + 1) / 5 for s in range(5)]
    decay = [1e-3 + (1e-6 - 1e-3) * (s + 1) / 6 for s in range(6)]
    assert [row["lr"] for row in rows] == pytest.approx([*warmup, *[1e-3] * 7, *decay], rel=1e-12)
    assert rows[-1]["lr"] == 1e-6  # exactly
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["ema"] == 0.9 for row in rows)
    ranks = [row["effective_rank"] for row in rows if row["effective_rank"] is not None]
    assert len(ranks) >= 6
    assert all(1 <= rank <= 48 for rank in ranks)


_STAMPED = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (?P<level>\w+) \[(?P<process>[^]]*)\] (?P<text>.*)"


def logged(stage: Path, rank: int) -> list[re.Match[str]]:
    """Every line that a rank has written to stdout while it trained."""
    lines = "".join(path.read_text() for path in stage.rglob(f"logs/*_{rank}_log.out")).splitlines()
    return [found for line in lines if (found := re.fullmatch(_STAMPED, line))]


def test_every_line_of_a_log_says_when_and_which_rank(finished: Path) -> None:
    lines = logged(finished / "pretrain", 0)
    assert {(line["level"], line["process"]) for line in lines} == {("info", "pretrain rank 0")}
    steps = [
        line["text"] for line in lines if re.match(r"pretrain/(warmup|constant)  step \d+/12  loss \d", line["text"])
    ]
    assert len(steps) >= 2
    assert any(line["text"].startswith("saved ") for line in lines)


@pytest.mark.slow
def test_debug_shows_where_time_goes_and_what_is_read(
    two_data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VJEPA_LOG", "debug")
    cfg = {"launch": {"tasks_per_node": 2}, "cooldown": None, "data": {"workers": 1}}
    cfg["pretrain"] = {"steps": 2, "phases": [{"name": "all", "start_lr": 1e-3}]}
    said = launch(write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets, **cfg)).stdout
    assert "opens record" not in said  # it is in the logs
    for rank in range(2):
        lines = [line for line in logged(tmp_path / "run" / "pretrain", rank) if "," not in line["process"]]
        by_process: dict[str, list[str]] = {}
        for line in lines:
            by_process.setdefault(line["process"], []).append(line["text"])
        own = by_process[f"pretrain rank {rank}"]
        parts = ("forward", "backward", "observe", "reduce", "optimizer", "ema")  # observe: in some steps
        times = "".join(f"(, {name} [0-9.]+ s){'?' * (name == 'observe')}" for name in parts)
        assert sum(bool(re.fullmatch(rf"step \d: load [0-9.]+ s{times}", text)) for text in own) == 2
        assert any(re.search(r"checkpoint of step 2: \d{4,} bytes of this rank: copy [0-9.]+ s", text) for text in own)
        assert any(re.search(r"step_00000002: \d{4,} bytes of all ranks: begin .*, publish", text) for text in own)
        assert any("attention by PyTorch's" in text for text in own)
        read = [text for text in by_process[f"pretrain rank {rank} worker 0"] if "opens record" in text]
        assert {text.split()[1] for text in read} == {"0", "1"}
        assert all(".tar" in text for text in read)


def test_files_are_where_users_are_told(finished: Path) -> None:
    names = {path.name for path in (finished / "pretrain" / "checkpoints").iterdir()}
    # every 4 steps with 2 kept, and the ends of phases (5, 12) always
    assert names == {"step_00000005", "step_00000008", "step_00000012"}
    assert (finished / "cooldown" / "checkpoints" / "step_00000018").is_dir()
    assert (finished / "cooldown" / "recipe.yaml").exists()
    assert (finished / "ledger.jsonl").read_text() == ""


def test_cooldown_goes_on_from_pretraining(finished: Path, two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    """With a rate of 0 and a still EMA, cooldown's first checkpoint holds what the stage started from."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        pretrain=None,
        jepa={"ema_momentum": 1.0},
        optimizer={"betas": [0.9, 0.999]},
        cooldown={
            "continue_from": str(finished / "pretrain"),
            "steps": 1,
            "phases": [{"name": "still", "start_lr": 0.0}],
        },
    )
    launch(recipe)
    before = checkpoint_tensors(finished / "pretrain" / "checkpoints" / "step_00000012", tmp_path)
    after = checkpoint_tensors(tmp_path / "run" / "cooldown" / "checkpoints" / "step_00000013", tmp_path)
    assert before.keys() == after.keys()
    for name in before:
        if not name.startswith("optimizer."):
            assert torch.equal(before[name], after[name]), name
    # One more step of AdamW: v' = 0.999·v + 0.001·g², so v' ≥ 0.999·v says that v was carried over.
    second = [name for name in before if name.startswith("optimizer.exp_avg_sq.")]
    assert second
    assert all((after[name] >= before[name] * 0.999 * (1 - 1e-6)).all() for name in second)
    assert any((before[name] > 0).any() for name in second)
    first = next(name for name in before if name == "optimizer.exp_avg.encoder.blocks.0.attn.qkv.weight")
    assert torch.nn.functional.cosine_similarity(before[first].flatten(), after[first].flatten(), dim=0) > 0.5
    # Twelve steps of eight clips were drawn before, and the moments have seen them.
    manifest = told(tmp_path / "run" / "cooldown" / "checkpoints" / "step_00000013")
    assert sum(manifest["base"].values()) == 12 * 8
    assert sum(manifest["drawn"].values()) == 13 * 8
    assert manifest["optimizer_steps"] == 13


def test_a_stage_goes_on_from_its_newest_checkpoint(
    finished: Path, two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    """The run without its last checkpoint, as a lost node leaves it: what comes out is the same to the bit."""
    run = tmp_path / "run"
    shutil.copytree(finished / "pretrain", run / "pretrain")
    shutil.rmtree(run / "pretrain" / "checkpoints" / "step_00000012")
    (run / "pretrain" / "history.jsonl").unlink()  # by which its launcher, this process maybe, would be at work still
    recipe = write_recipe(tmp_path / "recipe.yaml", run, two_data_sets, launch={"tasks_per_node": 2})
    launch(recipe, "--stages", "pretrain")
    history = [json.loads(line) for line in (run / "pretrain" / "history.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in history if row["event"] == "started"] == [("resume", 8)]
    assert metrics(run, "pretrain") == metrics(finished, "pretrain")
    last = "pretrain/checkpoints/step_00000012"
    assert told(run / last)["optimizer_steps"] == 12
    (tmp_path / "now").mkdir()
    before, now = checkpoint_tensors(finished / last, tmp_path), checkpoint_tensors(run / last, tmp_path / "now")
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_cooldown_without_its_checkpoint_is_refused(
    finished: Path, two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", two_data_sets)
    done = launch(recipe, "--stages", "cooldown", check=False)
    assert done.returncode == 2
    assert "cooldown.continue_from" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "cooldown" / "checkpoints").exists()
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "cooldown")
    shutil.rmtree(tmp_path / "run" / "pretrain" / "checkpoints" / "step_00000012")  # 8 of 12 steps
    done = launch(recipe, "--stages", "cooldown", check=False)
    assert done.returncode == 2
    assert "stands at step 8" in done.stderr


@pytest.mark.slow
def test_resume_refuses_what_would_rewrite_history(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    sets = {**two_data_sets, "left": tmp_path / "left"}
    sets["left"].symlink_to(two_data_sets["left"])
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", sets, cooldown=None)
    launch(recipe, "pretrain.steps=8")
    for override, named in (
        ("model.encoder.heads=4", "model.encoder.heads: 2 then, 4 now"),
        ("pretrain.phases.0.final_lr=2e-3", "pretrain (steps 0 to 4).lr at step 4: 0.001 then, 0.002 now"),
    ):
        done = launch(recipe, override, check=False)
        assert done.returncode == 2
        assert "the recipe differs from the one that trained" in done.stderr
        assert named in done.stderr
    # Other shards under the same path, and nothing else changed.
    sets["left"].unlink()
    sets["left"].symlink_to(two_data_sets["right"])
    done = launch(recipe, check=False)
    assert done.returncode == 2
    assert "data.sets.left.path" in done.stderr
    sets["left"].unlink()
    sets["left"].symlink_to(two_data_sets["left"])
    # A longer stage is not another history: the finished run of 8 steps goes on to 12.
    launch(recipe, "log.every=1", "data.workers=0")
    assert [row["step"] for row in metrics(tmp_path / "run", "pretrain")] == list(range(12))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("overrides", "differences"),
    [
        (["run.seed=6"], ["run.seed: 5 then, 6 now"]),
        (["engine.precision=bfloat16"], ["engine.precision: float32 then, bfloat16 now"]),
        (["data.fps=5"], ["data.fps: 4 then, 5 now"]),
        (["data.augment.rate=[0.5, 2]"], ["data.augment.rate: [1.0, 1.0] then, [0.5, 2.0] now"]),
        (
            ["data.sets.left.frames=2", "data.sets.right.frames=4"],  # 4 is the phases' own
            [f'pretrain (steps {s}).frames of their own: {{}} then, {{"left": 2}} now' for s in ("0 to 4", "5 to 7")],
        ),
        (
            ["data.sets.right.fps=2", "data.sets.left.fps=4"],
            [f'pretrain (steps {s}).fps of their own: {{}} then, {{"right": 2.0}} now' for s in ("0 to 4", "5 to 7")],
        ),
        (["data.augment.area=[0.5, 1]"], ["data.augment.area: [0.3, 1.0] then, [0.5, 1.0] now"]),
        (["masks.generators.0.blocks=8"], ["masks.generators.0.blocks: 4 then, 8 now"]),
        (["masks.generators=[{blocks: 4, spatial_scale: 0.15}]"], ["masks.generators: 2 items then, 1 item now"]),
        (["masks.generators.1.max_keep=5"], ["masks.generators.1.max_keep: null then, 5 now"]),
        (["jepa.ema_momentum=0.5"], ["jepa.ema_momentum: 0.9 then, 0.5 now"]),
        (["optimizer.eps=1e-6"], ["optimizer.eps: 1e-08 then, 1e-06 now"]),
        (["data.sets.more={path: x, weight: 0}"], []),  # for stages that name it
        (
            ["data.sets.more={path: x, weight: 1}"],
            [
                'data.sets: ["left", "right"] then, ["left", "right", "more"] now',
                'pretrain (steps 0 to 4).mixture: {"left": 2.0, "right": 2.0} then, '
                '{"left": 2.0, "right": 2.0, "more": 1.0} now',
            ],
        ),
        (["pretrain.phases.1.clip.frames=8"], ["pretrain (steps 5 to 7).clip.frames: 4 then, 8 now"]),
        (["pretrain.phases.0.clip.size=48"], ["pretrain (steps 0 to 4).clip.size: [32, 40] then, [48, 48] now"]),
        (["pretrain.phases.1.mixture.right=2"], ["pretrain (steps 5 to 7).mixture.right: 3 then, 2 now"]),
        (
            ["pretrain.phases.1.mixture={left: 1}"],
            ['pretrain (steps 5 to 7).mixture: {"left": 1.0, "right": 3.0} then, {"left": 1.0} now'],
        ),
        (
            ["pretrain.phases.0.steps=4"],
            ["pretrain.phases: steps 0 to 4, steps 5 to 7 then, steps 0 to 3, steps 4 to 7 now"],
        ),
        (["pretrain.steps=6"], ["pretrain.phases: steps 0 to 4, steps 5 to 7 then, steps 0 to 4, steps 5 to 5 now"]),
        (
            ["pretrain.global_batch=16"],
            [f"pretrain (steps {steps}).global_batch: 8 then, 16 now" for steps in ("0 to 4", "5 to 7")],
        ),
        (
            ["pretrain.phases.0.final_lr=2e-3", "run.seed=6", "pretrain.global_batch=16"],
            [
                "run.seed: 5 then, 6 now",
                "pretrain (steps 0 to 4).lr at step 0: 0.00028 then, 0.00048 now",
                "pretrain (steps 0 to 4).lr at step 4: 0.001 then, 0.002 now",
                "pretrain (steps 0 to 4).global_batch: 8 then, 16 now",
                "and 3 more",
            ],
        ),
        (["pretrain.init_from=other.pt"], ["pretrain.init_from: null then, other.pt now"]),
        (["pretrain.steps=20", "data.workers=0", "checkpoint.every=3", "pretrain.phases.1.final_lr=1e-3"], []),
    ],
)
def test_what_differs_from_the_recipe_that_trained_is_named(
    overrides: list[str], differences: list[str], tmp_path: Path
) -> None:
    """A checkpoint after 8 of 12 steps; the recipe of tests/chain.py."""
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", {"left": tmp_path, "right": tmp_path})
    trained = load_recipe(path).model_dump(mode="json", exclude_none=True)
    checkpoint = store.save(tmp_path, 8, {"a": torch.ones(1)}, {"recipe": trained, "first": 0})
    recipe = load_recipe(path, overrides)
    if not differences:
        refuse_other_recipe(stages_of(recipe)["pretrain"], checkpoint)
        return
    with pytest.raises(UserError) as refusal:
        refuse_other_recipe(stages_of(recipe)["pretrain"], checkpoint)
    assert refusal.value.what == f"the recipe differs from the one that trained {checkpoint}: {'; '.join(differences)}"


def test_a_frozen_encoder_is_that_of_one_step_of_one_source(tmp_path: Path) -> None:
    """A checkpoint of a stage that began with the twelfth step of pretraining."""
    cooldown = {"continue_from": None, "init_from": "pretrain", "phases": [{"name": "decay", "start_lr": 1e-3}]}
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path, {"left": tmp_path, "right": tmp_path}, cooldown=cooldown)
    trained = load_recipe(path).model_dump(mode="json", exclude_none=True)
    manifest = {"recipe": trained, "first": 0, "origin": {"stage": "pretrain", "step": 12}}
    checkpoint = store.save(tmp_path, 2, {"a": torch.ones(1)}, manifest)
    refuse_other_recipe(stages_of(load_recipe(path))["cooldown"], checkpoint)
    for override, said in (("pretrain.steps=14", "now ends at 14"), ("cooldown.init_from=a/b", "cooldown.init_from")):
        with pytest.raises(UserError, match=said):
            refuse_other_recipe(stages_of(load_recipe(path, [override]))["cooldown"], checkpoint)


@pytest.mark.parametrize("word", ["continue_from", "init_from"])
def test_a_source_is_known_by_its_identity(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a stage that began at ``old``, spelled as a relative path; ``new`` is where that was moved."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("new", 1.0), ("other", 2.0)):
        source = store.save(tmp_path / name / "pretrain" / "checkpoints", 12, {"a": torch.full((1,), value)}, {})
        files = sorted(source.glob("*.distcp"))
        sums = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
        if name == "new":
            identity = hashlib.sha256(sums.encode()).hexdigest()
    stage = {**dict.fromkeys(["continue_from", "init_from"]), word: "old/pretrain"}
    cooldown = stage | {"phases": [{"name": "decay", "start_lr": 1e-3}]}
    data = {"left": tmp_path, "right": tmp_path}
    path = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", data, pretrain=None, cooldown=cooldown)
    trained = load_recipe(path).model_dump(mode="json", exclude_none=True)
    first = 12 if word == "continue_from" else 0
    origin = {"path": "old/pretrain/checkpoints/step_00000012", "stage": "pretrain", "step": 12, "identity": identity}
    manifest = {"recipe": trained, "first": first, "origin": origin}
    checkpoint = store.save(tmp_path / "own", first + 2, {"a": torch.ones(1)}, manifest)
    step = "checkpoints/step_00000012"
    for same in (
        tmp_path / "old/pretrain",
        "new/pretrain",
        "new/pretrain/checkpoints",
        tmp_path / "new/pretrain" / step,
    ):
        refuse_other_recipe(stages_of(load_recipe(path, [f"cooldown.{word}={same}"]))["cooldown"], checkpoint)
    other_word = {"continue_from": "init_from", "init_from": "continue_from"}[word]
    for overrides in (
        [f"cooldown.{word}=other/pretrain"],
        [f"cooldown.{word}=other/pretrain/{step}"],
        [f"cooldown.{word}=nowhere"],
        [f"cooldown.{word}=null", f"cooldown.{other_word}=new/pretrain"],
    ):
        with pytest.raises(UserError, match=rf"cooldown\.{word}: old/pretrain then, "):
            refuse_other_recipe(stages_of(load_recipe(path, overrides))["cooldown"], checkpoint)


def test_a_finished_run_is_not_taken_for_another_recipes_result(finished: Path) -> None:
    for override, named in (("run.seed=9", "run.seed"), ("pretrain.steps=14", "goes back to step 12")):
        done = launch(finished / "recipe.yaml", override, "--stages", "cooldown", check=False)
        assert done.returncode == 2
        assert named in done.stderr
        assert "recipe.yaml:" in done.stderr


@pytest.mark.slow
def test_a_stage_does_not_go_with_a_predecessor_that_was_trained_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pretrain")
    words = (finished / "recipe.yaml", f"run.dir={tmp_path / 'run'}")
    slower = [*words, "pretrain.phases=[{name: constant, start_lr: 1e-5}]"]
    done = launch(*words, check=False)  # no step is known to be another's yet
    assert done.returncode == 0
    assert "trained again" not in done.stdout  # the same steps again are the same weights
    shutil.rmtree(tmp_path / "run" / "pretrain")
    launch(*slower, "--stages", "pretrain")
    done = launch(*slower, check=False)
    assert done.returncode == 2
    assert "'pretrain' has been trained again since" in done.stderr


def test_dumped_order_of_a_stage_is_that_of_the_whole_run(
    finished: Path, two_data_sets: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "not run yet", two_data_sets)
    whole = tool("launch", recipe, "--dump-order", "12:15").stdout
    header, *rows = whole.splitlines()
    assert header == "# step\tslot\tdata set\trecord\tstart in seconds\tframes\tframes per second\tstage"
    assert [row.split("\t")[:2] for row in rows] == [[str(step), str(i)] for step in (12, 13, 14) for i in range(8)]
    assert tool("launch", recipe, "--stages", "cooldown", "--dump-order", "12:15").stdout == whole
    assert tool("launch", finished / "recipe.yaml", "--dump-order", "12:15").stdout == whole  # as it was trained
    branch = write_recipe(
        tmp_path / "branch.yaml",
        tmp_path / "branch",
        two_data_sets,
        pretrain=None,
        cooldown={"continue_from": str(finished / "pretrain"), "phases": [{"name": "decay", "start_lr": 1e-3}]},
    )
    assert tool("launch", branch, "--dump-order", "12:15").stdout == whole


def test_a_second_launch_of_a_finished_run_does_nothing(finished: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    done = launch(finished / "recipe.yaml")
    assert "already complete" in done.stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_consolidated_encoder_has_the_target_encoders_weights(finished: Path, tmp_path: Path) -> None:
    import vjepa_scale

    tool("consolidate", finished, "--to", "safetensors", "--out", tmp_path / "out")
    trained = checkpoint_tensors(finished / "cooldown" / "checkpoints" / "step_00000018", tmp_path)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in stored.items():
        source = name.replace("encoder.", "target_encoder.", 1) if name.startswith("encoder.") else name
        assert torch.equal(tensor, trained[source]), name
    assert {name for name in trained if name.startswith("target_encoder.")} == {
        f"target_{name}" for name in stored if name.startswith("encoder.")
    }
    for place in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        encoder = vjepa_scale.load_encoder(place)
        assert encoder(torch.randn(2, 3, 8, 40, 48)).shape == (2, 4 * 5 * 6, 48)


@pytest.mark.slow
def test_same_numbers_for_any_ranks_and_micro_batches(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    """1, 2 and 4 processes; micro-batches of 1, 2 and 4; 20 steps over a phase switch; float32.

    1e-5: sums of a few thousand float32 terms in another order differ by about 1e-6 relative, and twenty
    AdamW steps at this rate amplify that by less than ten.
    """
    runs = {}
    for tasks, micro in ((1, 4), (1, 1), (2, 2), (4, 1), (2, 4)):
        name = f"{tasks}x{micro}"
        recipe = write_recipe(
            tmp_path / f"{name}.yaml",
            tmp_path / name,
            two_data_sets,
            launch={"tasks_per_node": tasks},
            optimizer={"eps": 1e-4},  # damps Adam where the true gradient is zero (attention key biases)
            pretrain={"steps": 20, "micro_batch": micro},
            cooldown=None,
        )
        order = tool("launch", recipe, "--dump-order", "0:20").stdout  # what ranks load: tests/data/test_loader.py
        launch(recipe)
        runs[name] = (order, metrics(tmp_path / name, "pretrain"))
    order, reference = runs.pop("1x4")
    assert len(order.splitlines()) == 1 + 20 * 8
    assert len(reference) == 20
    assert abs(reference[-1]["loss"] / reference[0]["loss"] - 1) > 0.01  # something was learned
    for name, (other_order, rows) in runs.items():
        assert other_order == order, name
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in reference], rel=1e-5), (name, key)
