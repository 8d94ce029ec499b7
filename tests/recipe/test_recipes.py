"""The real recipes say what the method says (numbers of the paper and the published configs, written out here)."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe import load_recipe, recipe_yaml, stages_of
from vjepa_scale.recipe.load import validate_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.iterdir())
SIZES = {
    "vitl_256": (1024, 24, 16, 4096),
    "vith_256": (1280, 32, 16, 5120),
    "vitg_256": (1408, 40, 22, 6144),
    "vitg_384": (1408, 40, 22, 6144),
}


@pytest.mark.parametrize("name", SIZES)
def test_real_recipes_are_the_papers(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    encoder = recipe.model.encoder
    assert (encoder.width, encoder.depth, encoder.heads, encoder.mlp_hidden) == SIZES[name]
    predictor = recipe.model.predictor
    assert (predictor.width, predictor.depth, predictor.heads, predictor.mlp_hidden) == (384, 12, 12, 1536)
    assert (recipe.model.patch, recipe.model.tubelet, recipe.model.rope.layout) == (16, 2, "tiled")

    short, long = recipe.masks.generators
    assert (short.blocks, short.spatial_scale, short.temporal_scale) == (8, (0.15, 0.15), (1.0, 1.0))
    assert (long.blocks, long.spatial_scale, long.temporal_scale) == (2, (0.7, 0.7), (1.0, 1.0))
    assert short.aspect_ratio == long.aspect_ratio == (0.75, 1.5)
    assert recipe.masks.group == 24

    assert recipe.jepa.ema_momentum == 0.99925
    assert recipe.jepa.loss_exponent == 1.0
    optimizer = recipe.optimizer
    assert (optimizer.kind, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (
        "adamw",
        (0.9, 0.999),
        1e-8,
        0.04,
    )
    assert optimizer.clip_grad_norm is None

    assert recipe.data.fps == 4
    augment = recipe.data.augment
    assert (augment.area, augment.aspect, augment.flip) == ((0.3, 1.0), (0.75, 1.35), 0.5)

    warmup, constant = stages_of(recipe)["pretrain"].phases
    assert sorted(warmup.mixture.values()) == [0.1, 0.335, 0.565]
    (decay,) = stages_of(recipe)["cooldown"].phases
    assert (warmup.first, warmup.end, constant.end, decay.end) == (0, 12_000, 240_000, 252_000)
    assert warmup.lr(11_999) == constant.lr(12_000) == constant.lr(239_999) == 5.25e-4
    assert warmup.lr(0) == pytest.approx(1e-4 + (5.25e-4 - 1e-4) / 12_000, rel=1e-12)
    assert decay.lr(251_999) == 1e-6
    assert {p.global_batch for p in (warmup, constant, decay)} == {3072}
    assert warmup.frames == constant.frames == 16
    assert warmup.size == constant.size == (256, 256)
    assert decay.frames == 64
    assert decay.size == ((384, 384) if name == "vitg_384" else (256, 256))


@pytest.mark.parametrize(
    ("name", "stages"), [("vitg_droid", ["action"]), ("vitg_384", ["pretrain", "cooldown", "action"])]
)
def test_action_conditioned_recipe_is_the_published_one(name: str, stages: list[str]) -> None:
    """315 epochs of 300 steps, of which 15 warm up and 15 decay; 32 GPUs with 8 clips each."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert list(recipe.stages()) == stages
    assert stages_of(recipe)["action"].world_size == 32
    assert stages_of(recipe)["action"].data_sets == ["droid"]
    predictor = recipe.model.action_predictor
    assert (predictor.width, predictor.depth, predictor.heads, predictor.mlp_hidden) == (1024, 24, 16, 4096)
    assert (predictor.grid, predictor.extrinsics) == ((16, 16), False)
    assert recipe.action is not None
    assert (recipe.action.rollout_steps, recipe.action.crop_aspect, recipe.action.loss_exponent) == (
        2,
        (0.75, 1.35),
        1.0,
    )
    warmup, constant, decay = stages_of(recipe)["action"].phases
    assert (warmup.end, constant.end, decay.end) == (15 * 300, 300 * 300, 315 * 300)
    assert (warmup.lr(4_499), constant.lr(50_000), decay.lr(94_499)) == (4.25e-4, 4.25e-4, 0)
    assert warmup.lr(0) == pytest.approx(7.5e-5 + 3.5e-4 / 4_500, rel=1e-12)
    assert {(p.frames, p.size, p.global_batch, p.micro_batch) for p in (warmup, constant, decay)} == {
        (8, (256, 256), 8 * 32, 8)
    }
    assert (recipe.data.fps, recipe.optimizer.weight_decay) == (4, 0.04)


def test_probes_are_trained_and_read_as_published() -> None:
    """configs/eval/vitl/ssv2.yaml of the published code: batch 4 on 64 GPUs, 20 epochs of SSv2's 168,913 videos."""
    recipe = load_recipe(RECIPES / "probe_ssv2.yaml")
    assert list(recipe.stages()) == ["probe"]
    probe, phases = recipe.probe, stages_of(recipe)["probe"].phases
    assert probe is not None
    assert (recipe.model.encoder.width, probe.heads, probe.depth, probe.eps) == (1024, 16, 4, 1e-5)
    assert (probe.clip.frames, probe.clip.size, recipe.data.fps) == (16, (256, 256), 12 / 4)
    assert (probe.views.segments, probe.views.crops) == (2, 3)
    assert [5e-3 * scale for scale in probe.lr_scales] == pytest.approx([5e-3, 3e-3, 1e-3, 3e-4, 1e-4])
    assert probe.weight_decays == (0.01, 0.1, 0.4, 0.8)
    assert probe.global_batch == 4 * 64 == recipe.launch.nodes * recipe.launch.tasks_per_node * probe.micro_batch
    assert probe.steps == phases[-1].end == 20 * math.ceil(168_913 / 256)
    assert [phase.mixture for phase in phases] == [{"ssv2_train": 1.0}]
    rates = [phase.lr(step) for phase in phases for step in range(phase.first, phase.end)]
    cosine = [2.5e-3 * (1 + math.cos(math.pi * (step + 1) / 13_200)) for step in range(13_200)]
    assert rates == pytest.approx(cosine, rel=1e-9, abs=1e-15)
    assert rates[-1] == 0


@pytest.mark.parametrize("name", [*SIZES, "vitg_droid", "demo", "probe_ssv2"])
def test_resolved_recipe_loads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    (tmp_path / "resolved.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_learning_rate_of_every_step_is_the_closed_form() -> None:
    recipe = validate_recipe(
        small_recipe(
            pretrain={
                "steps": 10,
                "phases": [
                    {"name": "warmup", "steps": 4, "start_lr": 0.1, "final_lr": 0.5},
                    {"name": "constant"},
                ],
            },
            cooldown={"steps": 3, "continue_from": "pretrain", "phases": [{"name": "decay", "final_lr": 0.2}]},
        ),
        source="test",
    )
    rates = [
        p.lr(s)
        for stage in ("pretrain", "cooldown")
        for p in stages_of(recipe)[stage].phases
        for s in range(p.first, p.end)
    ]
    # warmup: 0.1 + 0.4·(s+1)/4; constant; decay: 0.5 − 0.3·(i+1)/3
    assert rates == pytest.approx([0.2, 0.3, 0.4, 0.5, *[0.5] * 6, 0.4, 0.3, 0.2], rel=1e-12)
    assert rates[-1] == 0.2  # exactly


def small_recipe(**stages: dict) -> dict:
    small = {"global_batch": 24, "micro_batch": 12, "clip": {"frames": 4, "size": [32, 48]}}
    return {
        "run": {"dir": "runs/x"},
        "data": {"sets": {"a": {"path": "a"}, "b": {"path": "b", "weight": 3}}},
        "model": {"encoder": {"width": 32, "depth": 1, "heads": 2}},
        **{name: {**small, **stage} for name, stage in stages.items()},
    }


ONE_PHASE = [{"name": "all", "start_lr": 0.1}]


@pytest.mark.parametrize(
    ("path", "value", "key", "hint"),
    [
        ("model.encodr", 1, "model.encodr", "did you mean 'encoder'"),
        ("model.encoder", "vit_enormous", "model.encoder", "vit_giant"),
        ("model.encoder", {"width": 100, "depth": 1, "heads": 3}, "model.encoder", "head size"),
        ("pretrain.stepz", 3, "pretrain.stepz", "did you mean 'steps'"),
        ("pretrain.steps", "many", "pretrain.steps", "must be a whole number, not 'many'"),
        ("pretrain.steps", 0, "pretrain.steps", "must be greater than 0, not 0"),
        ("run.seed", "x", "run.seed", "must be a whole number, not 'x'"),
        ("run.seed", 1.5, "run.seed", "must be a whole number, not 1.5"),
        ("run.dir", 3, "run.dir", "must be text, not 3"),
        ("run", {}, "run.dir", "missing"),
        ("data.fps", "fast", "data.fps", "must be a number, not 'fast'"),
        ("data.fps", float("inf"), "data.fps", "must be a finite number, not inf"),
        ("data.workers", -1, "data.workers", "must be at least 0, not -1"),
        ("jepa", {"ema_momentum": 2}, "jepa.ema_momentum", "must be at most 1, not 2"),
        ("engine.reshard_after_forward", "maybe", "engine.reshard_after_forward", "must be true or false, not 'maybe'"),
        ("engine.reshard_after_forward", None, "engine.reshard_after_forward", "must be true or false, not None"),
        ("masks.generators", 3, "masks.generators", "must be a list, not 3"),
        ("optimizer.betas", [0.9, 0.9, 0.9], "optimizer.betas", "must have at most 2 item(s)"),
        ("model", 3, "model", "must be a section of keys, not 3"),
        ("data.sets", ["a"], "data.sets", "must be a section of keys"),
        ("pretrain.global_batch", 100, "pretrain.global_batch", "a multiple of masks.group (24)"),
        ("pretrain.micro_batch", 7, "pretrain.micro_batch", "a divisor of masks.group (24)"),
        ("pretrain.clip.size", 250, "pretrain.clip.size", "patches of 16"),
        ("pretrain.clip.frames", 5, "pretrain.clip.frames", "tubelets of 2"),
        ("pretrain.mixture", {"c": 1.0}, "pretrain.mixture", "known: a, b"),
        ("pretrain.mixture", {"a": 0.0}, "pretrain.mixture", "nothing to draw from"),
        ("pretrain.phases", [{"name": "w", "steps": 12, "start_lr": 0.1}], "pretrain.phases", "the stage has 10"),
        ("pretrain.continue_from", "cooldown", "pretrain.continue_from", "no earlier stage"),
        ("pretrain.phases", [{"name": "a", "final_lr": 0.1}], "pretrain.phases", "no start_lr"),
        ("data.augment", {"area": [1.0, 0.3]}, "data.augment.area", "from low to high"),
        ("data.augment", {"std": [0, 0, 0]}, "data.augment.std.0", "must be greater than 0, not 0"),
        (
            "masks",
            {"generators": [{"blocks": 1, "spatial_scale": 0.1, "aspect_ratio": 0}]},
            "masks.gen",
            "greater than 0",
        ),
        ("optimizer.betas", [2, 3], "optimizer.betas.0", "must be less than 1, not 2"),
        ("data.sets", {}, "data.sets", "must have at least 1 item"),
        ("engine.kind", "fsdp3", "engine.kind", "must be 'fsdp' or 'deepspeed', not 'fsdp3'"),
        ("engine", {"kind": "deepspeed", "zero_stage": 0}, "engine.zero_stage", "must be 1, 2 or 3, not 0"),
        ("engine", {"kind": "deepspeed", "replicate": 2}, "engine", "replicate is FSDP2's"),
        ("engine", {"kind": "deepspeed", "zero_stage": 3, "compile": True}, "engine", "does not go with"),
        ("masks.multiple_of", 0, "masks.multiple_of", "must be greater than 0"),
    ],
)
def test_bad_values_are_one_error_that_names_the_key(path: str, value: object, key: str, hint: str) -> None:
    tree = small_recipe(pretrain={"steps": 10, "phases": ONE_PHASE})
    node = tree
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    with pytest.raises(UserError) as caught:
        validate_recipe(tree, source="my.yaml")
    assert f"my.yaml:{key}" in str(caught.value)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "nput should" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["data.faults.decode_timeout_s=9999"], "{path}: data.faults.decode_timeout_s 9999 is not less than"),
        (["engine.kind=deepspeed", "engine.replicate=3"], "command line:engine: replicate is FSDP2's"),
        ([f"{stage}=null" for stage in ("pretrain", "cooldown", "action", "probe")], "{path}: no stage to run"),
    ],
)
def test_an_error_about_several_keys_names_what_they_have_in_common(overrides: list[str], where: str) -> None:
    path = RECIPES / "demo.yaml"
    with pytest.raises(UserError) as raised:
        load_recipe(path, overrides)
    assert str(raised.value).startswith(where.format(path=path))


def test_a_phase_takes_from_its_stage_what_it_leaves_out() -> None:
    phases = [{"name": "a", "start_lr": 0.1, "steps": 2}, {"name": "b", "clip": {"size": 64}}]
    recipe = validate_recipe(small_recipe(pretrain={"steps": 10, "phases": phases}), source="test")
    first, second = stages_of(recipe)["pretrain"].phases
    assert (first.frames, first.size) == (4, (32, 48))
    assert (second.frames, second.size) == (4, (64, 64))
    assert second.lr(9) == 0.1


def test_overrides_and_extends(tmp_path: Path) -> None:
    recipe = load_recipe(
        RECIPES / "vitg_384.yaml",
        ["model.encoder=vit_large", "pretrain.phases.0.steps=100", "optimizer.eps=1e-6", "run.dir=somewhere else"],
    )
    assert recipe.model.encoder.width == 1024
    assert recipe.optimizer.eps == 1e-6
    assert recipe.run.dir == "somewhere else"
    assert stages_of(recipe)["pretrain"].phases[0].steps == 100
    refined = load_recipe(RECIPES / "vitg_384.yaml", ["model.encoder.depth=2"])
    assert (refined.model.encoder.width, refined.model.encoder.depth) == (1408, 2)
    for override in ("pretrain.phases.0.steps.x=1", "pretrain.steps.x=1", "run.dir.x=1"):
        with pytest.raises(UserError, match="no keys below it"):
            load_recipe(RECIPES / "vitg_384.yaml", [override])
    with pytest.raises(UserError, match=r"dotted\.key=value"):
        load_recipe(RECIPES / "vitg_384.yaml", ["pretrain.steps"])
    others = ["data.sets.held_out=null", "data.sets.robot=null", "action=null", "probe=null"]
    mine = load_recipe(RECIPES / "demo.yaml", ["data.sets.synthetic=null", "data.sets.mine.path=shards", *others])
    assert list(mine.data.sets) == ["mine"]
    assert list(mine.stages()) == ["pretrain", "cooldown"]
    with pytest.raises(UserError, match="0 to 1"):
        load_recipe(RECIPES / "vitg_384.yaml", ["pretrain.phases.7.steps=100"])
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    with pytest.raises(UserError, match=r"loop\.yaml:extends: extends itself"):
        load_recipe(tmp_path / "loop.yaml")


def test_extends_says_what_its_path_is_relative_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    top = tmp_path / "mine/top.yaml"
    for value, said in (
        (
            "base.yaml",
            f"{top}:extends: no such recipe: {top.parent}/base.yaml (a path relative to the folder of this file, "
            f"{top.parent}, an absolute one, or a name: recipes in {RECIPES}: {', '.join(SHIPPED)})",
        ),
        ("[a.yaml, b.yaml]", f"{top}:extends: must be the path of one file, not ['a.yaml', 'b.yaml']"),
    ):
        top.write_text(f"extends: {value}\n")
        with pytest.raises(UserError) as refusal:
            load_recipe(top)
        assert str(refusal.value) == said


def chained(folder: Path, *files: dict) -> Path:
    """Files of which each extends the one before; the last one's path."""
    for number, tree in enumerate(files):
        below = {"extends": f"{number - 1}.yaml"} if number else {}
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(below | tree))
    return folder / f"{len(files) - 1}.yaml"


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"c": {"path": "c"}}, {"c": ("c", 1)}),
        ({"c": {"path": "c"}, "a": None}, {"c": ("c", 1)}),  # how it was written when mixtures were merged
        ({"b": {"path": "other"}}, {"b": ("other", 1)}),
        ({"b": None}, {"a": ("a", 1)}),
        (None, {"a": ("a", 1), "b": ("b", 3)}),
    ],
)
def test_data_sets_that_are_given_replace_those_below(given: dict | None, left: dict, tmp_path: Path) -> None:
    """Through two files, the upper of which says nothing of them."""
    base = small_recipe(pretrain={"steps": 10, "phases": ONE_PHASE})
    path = chained(tmp_path, base, {"data": {"sets": given} if given else {"lanes": 2}}, {"run": {"seed": 1}})
    assert {name: (s.path, s.weight) for name, s in load_recipe(path).data.sets.items()} == left


def test_a_mixture_that_is_given_replaces_the_one_below(tmp_path: Path) -> None:
    base = small_recipe(pretrain={"steps": 10, "phases": ONE_PHASE, "mixture": {"a": 1, "b": 2}})
    path = chained(tmp_path, base, {"pretrain": {"mixture": {"b": 1}}})
    assert load_recipe(path).pretrain.mixture == {"b": 1}
    path = chained(tmp_path, base, {"pretrain": {"mixture": {"b": None}}})
    assert load_recipe(path).pretrain.mixture == {"a": 1}
    assert load_recipe(path, ["pretrain.mixture.b=5"]).pretrain.mixture == {"a": 1, "b": 5}
    assert load_recipe(path, ["data.sets.b.weight=7"]).data.sets["b"].weight == 7
    assert list(load_recipe(path, ["data.sets={a: {path: x}}"]).data.sets) == ["a"]


@pytest.mark.parametrize(
    ("files", "overrides", "where"),
    [
        ([{"pretrain": {"stepz": 1}}, {}], [], "0.yaml:pretrain.stepz"),
        ([{}, {"pretrain": {"stepz": 1}}, {}], [], "1.yaml:pretrain.stepz"),
        ([{"pretrain": {"steps": "a"}}, {"pretrain": {"steps": "b"}}], [], "1.yaml:pretrain.steps"),
        ([{"pretrain": {"steps": "a"}}, {}], ["pretrain.steps=c"], "command line:pretrain.steps"),
        ([{}, {}], ["pretrain.phases.0.final_lr=x"], "command line:pretrain.phases.0.final_lr"),
        ([{"pretrain": {"phases": [{"name": "a", "start_lr": "x"}]}}, {}], [], "0.yaml:pretrain.phases.0.start_lr"),
        ([{}, {"data": {"sets": {"c": {"weight": 1}}}}, {}], [], "1.yaml:data.sets.c.path"),  # missing
        ([{}, {"pretrain": {"mixture": {"c": 1}}}, {}], [], "1.yaml:pretrain.mixture"),
        ([{}, {"data": {"sets": {}}}], [], "1.yaml:data.sets"),
    ],
)
def test_an_error_names_the_file_that_has_the_key(
    files: list[dict], overrides: list[str], where: str, tmp_path: Path
) -> None:
    base = small_recipe(pretrain={"steps": 10, "phases": ONE_PHASE})
    base["pretrain"] |= files[0].get("pretrain", {})
    path = chained(tmp_path, base, *files[1:])
    place = where if where.startswith("command") else f"{tmp_path}/{where}"
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert str(caught.value).startswith(f"{place}: ")


def test_real_networks_are_built_on_the_meta_device() -> None:
    from vjepa_scale.model.encoder import Encoder
    from vjepa_scale.model.predictor import Predictor

    recipe = load_recipe(RECIPES / "vitg_384.yaml")
    with torch.device("meta"):
        encoder, predictor = Encoder(recipe.model), Predictor(recipe.model)
    parameters = sum(p.numel() for p in encoder.parameters())
    assert 1.00e9 < parameters < 1.02e9  # ViT-g: 1.01 B in the paper
    assert 20e6 < sum(p.numel() for p in predictor.parameters()) < 25e6  # "ViT-s", 22 M
    assert all(p.is_meta for p in [*encoder.parameters(), *predictor.parameters()])


def test_the_page_of_keys_is_up_to_date() -> None:
    from vjepa_scale.recipe.reference import reference

    page = (RECIPES.parent / "docs" / "recipe_keys.md").read_text()
    assert page == reference(), "run: python -m vjepa_scale.recipe.reference > docs/recipe_keys.md"
    for key in (
        "`run.dir`",
        "`engine.kind`",
        "`<stage>.steps`",
        "`data.sets.NAME.weight`",
        "`<stage>.phases.N.final_lr`",
    ):
        assert key in page
