"""From one format to the next and back: no bit changes, and transformers computes what our networks do."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VJEPA2ForVideoClassification, VJEPA2Model

from tests.chain import tool
from tests.checkpoint.formats_material import (
    OTHER,
    SMALL,
    WIDE,
    model,
    network_of,
    one_encoder,
    published_dict,
    random_tensors,
    run_of,
    same,
    wide,
)
from tests.model.published import our_weights, random_published
from vjepa_scale.checkpoint.consolidate import consolidate, write_video_classifier
from vjepa_scale.checkpoint.formats import open_weights
from vjepa_scale.checkpoint.load import load_encoder, load_predictor, read_config
from vjepa_scale.core.errors import UserError
from vjepa_scale.model.probe import AttentiveProbe

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# float32 rounding of a few blocks, relative to the largest output: about 1e-6. A wrong name or order: 1e-2 and more.
RELATIVE = 1e-5


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def all_of(path: Path, **options: Any) -> dict[str, Tensor]:
    source = open_weights(path, **options)
    return {name: source.read(name).clone() for name, _, _ in source.entries}


# -- round trips -----------------------------------------------------------------------------------


def test_no_bit_changes_from_format_to_format(tmp_path: Path) -> None:
    tensors = run_of(tmp_path / "run", SMALL)
    ours = one_encoder(tensors)
    consolidate(tmp_path / "run", tmp_path / "a")
    consolidate(tmp_path / "a", tmp_path / "b", to="huggingface")
    consolidate(tmp_path / "b", tmp_path / "c", to="published")
    consolidate(tmp_path / "c/model.pt", tmp_path / "d")
    consolidate(tmp_path / "d", tmp_path / "e", to="published")
    consolidate(tmp_path / "e", tmp_path / "f", to="huggingface")
    assert same(load_file(tmp_path / "a/model.safetensors"), ours)
    for folder in "abcdef":
        assert same(all_of(tmp_path / folder), ours), folder
        assert read_config(tmp_path / folder) == read_config(tmp_path / "run"), folder
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "d/model.safetensors").read_bytes()
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "f/model.safetensors").read_bytes()


def test_a_published_file_of_a_run_has_both_encoders(tmp_path: Path) -> None:
    tensors = run_of(tmp_path / "run", SMALL)
    consolidate(tmp_path / "run", tmp_path / "both", to="published")
    assert same(all_of(tmp_path / "both", weights="both"), tensors)
    assert same(all_of(tmp_path / "both", weights="context"), one_encoder(tensors, "encoder"))
    assert same(all_of(tmp_path / "both"), one_encoder(tensors))
    assert same(all_of(tmp_path / "run", weights="both"), tensors)
    found = torch.load(tmp_path / "both/model.pt", weights_only=True)
    wanted = published_dict(tensors)
    assert found.keys() == wanted.keys()
    for name in ("encoder", "predictor", "target_encoder"):
        assert same(found[name], {key: value for key, value in wanted[name].items() if "pos_embed" not in key})
        assert list(found[name]) == [key for key in wanted[name] if "pos_embed" not in key]

    consolidate(tmp_path / "run", tmp_path / "context", to="published", weights="context")
    alone = one_encoder(tensors, "encoder")
    assert same(all_of(tmp_path / "context", weights="both"), alone)
    found = torch.load(tmp_path / "context/model.pt", weights_only=True)
    for name in ("encoder", "target_encoder"):
        assert same(
            {k.removeprefix("module.backbone."): v for k, v in found[name].items()}, network_of(alone, "encoder")
        )
    size = (tmp_path / "context/model.pt").stat().st_size
    assert size < 1.2 * sum(value.nbytes for value in alone.values()) + 50_000, "one encoder is stored once"
    with pytest.raises(UserError, match="holds the context encoder only"):
        open_weights(tmp_path / "context", weights="target")


@pytest.mark.parametrize("to", ["safetensors", "huggingface", "published"])
def test_rounding_to_bfloat16_is_the_only_change(tmp_path: Path, to: Any) -> None:
    tensors = run_of(tmp_path / "run", SMALL)
    consolidate(tmp_path / "run", tmp_path / "out", to=to, dtype="bfloat16", weights="target")
    assert same(all_of(tmp_path / "out"), {name: value.bfloat16() for name, value in one_encoder(tensors).items()})
    if to == "huggingface":
        assert VJEPA2Model.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert {p.dtype for p in load_encoder(tmp_path / "out").parameters()} == {torch.float32}


# -- beside transformers ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("tree", "crop", "frames"), [(SMALL, 32, 8), (OTHER, 64, 8), *map(wide, WIDE)])
def test_transformers_computes_what_we_do_from_ours(
    tmp_path: Path, tree: dict[str, Any], crop: int, frames: int, record_property: Any
) -> None:
    tensors = run_of(tmp_path / "run", tree, size=(crop, crop), frames=frames)
    said: list[str] = []
    folder = consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface", say=said.append)
    assert any(line.startswith("checked against transformers: features differ by ") for line in said)
    theirs, info = VJEPA2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    encoder, predictor = our_weights(theirs)
    assert same(encoder, network_of(tensors, "target_encoder"))
    assert same(predictor, network_of(tensors, "predictor"))
    record_property("measured", compare(theirs.eval(), folder, crop, frames))


@torch.no_grad()
@pytest.mark.parametrize(
    ("tree", "crop", "frames", "shards"),
    [(SMALL, 32, 4, False), (SMALL, 32, 4, True), (OTHER, 48, 16, True), *((*wide(name), False) for name in WIDE)],
)
def test_we_compute_what_transformers_does_from_theirs(
    tmp_path: Path, tree: dict[str, Any], crop: int, frames: int, shards: bool, record_property: Any
) -> None:
    theirs = random_published(model(tree), crop=crop, frames=frames, seed=5)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    encoder, predictor = our_weights(theirs)
    assert same(load_encoder(tmp_path).state_dict(), encoder)
    assert same(load_predictor(tmp_path).state_dict(), predictor)
    config = read_config(tmp_path)
    assert config.model == model(tree)
    assert (config.size, config.frames, config.weights, config.assumed) == ((crop, crop), frames, None, ())
    record_property("measured", compare(theirs, tmp_path, crop, frames))
    # Out again: their own file, byte for byte in every tensor.
    back = consolidate(tmp_path, tmp_path / "back", to="huggingface")
    wanted = theirs.state_dict()
    assert same(load_file(back / "model.safetensors"), wanted)


def compare(theirs: VJEPA2Model, folder: Path, crop: int, frames: int) -> str:
    """Features and predictions at random places of a random clip, from the same folder; their mask token is 1 mod M."""
    generator = torch.Generator().manual_seed(1)
    config = read_config(folder)
    encoder, predictor = load_encoder(folder), load_predictor(folder)
    clips = torch.randn(2, 3, frames, crop, crop, generator=generator)
    patch, tubelet = config.model.patch, config.model.tubelet
    grid = (frames // tubelet, crop // patch, crop // patch)
    count = grid[0] * grid[1] * grid[2]
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)])
    context, target = order[:, : count // 3], order[:, count // 2 :]
    output = theirs(clips.transpose(1, 2), context_mask=[context], target_mask=[target])
    tokens = encoder(clips)
    kept = torch.stack([row[places] for row, places in zip(tokens, context, strict=True)])
    predictions = predictor(kept, context, target, grid, mask_token=1)
    differences = (
        relative_difference(tokens, output.last_hidden_state),
        relative_difference(predictions, output.predictor_output.last_hidden_state),
    )
    assert max(differences) < RELATIVE
    # The comparison sees which mask token it is, where there are several.
    if config.model.predictor.mask_tokens > 1:
        other = predictor(kept, context, target, grid, mask_token=0)
        assert relative_difference(other, output.predictor_output.last_hidden_state) > 100 * RELATIVE
    return "features {:.1e}, predictions {:.1e}".format(*differences)


def test_the_preprocessing_is_ours(tmp_path: Path) -> None:
    # AutoVideoProcessor itself needs torchvision, which is not installed here; these are the keys that it reads.
    run_of(tmp_path / "run", SMALL)
    consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface")
    processor = json.loads((tmp_path / "hf/video_preprocessor_config.json").read_text())
    assert processor["video_processor_type"] == "VJEPA2VideoProcessor"
    assert processor["crop_size"] == {"height": 32, "width": 32}
    assert processor["size"] == {"shortest_edge": 36}  # 256/224 of the crop, as their processor insists
    assert (processor["image_mean"], processor["image_std"]) == ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225])
    assert all(processor[f"do_{what}"] for what in ("resize", "center_crop", "rescale", "normalize"))
    card = (tmp_path / "hf/README.md").read_text()
    assert "8 frames of 32×32 pixels, 4 frames per second" in card
    assert "global_batch: 4" in card


@pytest.mark.parametrize(
    ("tokens", "generators", "jepa", "words"),
    [
        (2, 2, {}, "uses mask token 1. It was trained by mask generator 1 (3 blocks of scale 0.3)"),
        (2, 2, {"mask_token": "first"}, "uses mask token 1. No mask generator of the recipe trained that token"),
        (2, 1, {}, "uses mask token 1. No mask generator of the recipe trained that token"),
        (1, 2, {}, "uses mask token 0. It was trained by mask generator 0 (2 blocks of scale 0.3) and generator 1 (3 "),
    ],
)
def test_the_user_is_told_which_masks_their_predictor_is_for(
    tmp_path: Path, tokens: int, generators: int, jepa: dict[str, str], words: str
) -> None:
    tree = SMALL | {"predictor": {"width": 24, "depth": 1, "heads": 2, "mlp_hidden": 48, "mask_tokens": tokens}}
    masks = {"generators": [{"blocks": 2 + j, "spatial_scale": 0.3} for j in range(generators)]}
    run_of(tmp_path / "run", tree, masks=masks, jepa=jepa)
    said: list[str] = []
    consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface", say=said.append)
    assert any(words in line for line in said)
    assert words.partition(". ")[2] in (tmp_path / "hf/README.md").read_text()


def test_the_card_of_a_model_that_was_trained_on_time_steps(tmp_path: Path) -> None:
    run_of(tmp_path / "run", SMALL, masks={"generators": [{"kind": "future"}, {"kind": "multi_rate"}]}, jepa={})
    said: list[str] = []
    consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface", say=said.append)
    assert any("It was trained by mask generator 1 (kind multi_rate) of the recipe" in line for line in said)


def test_a_wrong_result_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vjepa_scale.checkpoint.formats import huggingface

    run_of(tmp_path / "run", SMALL)
    monkeypatch.setattr(huggingface, "_QKV", ("key", "query", "value"))
    with pytest.raises(UserError, match="transformers computes something else: features differ by"):
        consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    said: list[str] = []
    consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface", check=False, say=said.append)
    assert "not checked against transformers: --no-check" in said


def test_the_check_sees_wrong_positions_in_fresh_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose attention is nearly uniform: as they are, features of the two layouts differ by 2e-5 of the largest."""
    from vjepa_scale.checkpoint.formats import huggingface

    run_of(tmp_path / "run", SMALL | {"rope": {"layout": "interleaved"}})
    monkeypatch.setattr(huggingface, "refuse_inexpressible", lambda *_: None)
    with pytest.raises(UserError, match="transformers computes something else") as refusal:
        consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface")
    found = re.search(r"features differ by (\S+), predictions differ by (\S+) ", str(refusal.value))
    assert found is not None
    assert all(float(value) > 1e-4 for value in found.groups())


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"rope": {"layout": "interleaved"}}, (32, 32), "rope.layout is interleaved, theirs is tiled"),
        ({"rope": {"grid": 4}}, (32, 32), "rope.grid rescales positions"),
        ({"positions": "sincos", "sincos": {"frames": 8, "size": 32}}, (32, 32), "model.positions is sincos"),
        ({}, (32, 48), "clips of 32×48 pixels, theirs are square"),
    ],
)
def test_what_their_model_cannot_express_is_refused(
    tmp_path: Path, change: dict[str, Any], size: tuple[int, int], message: str
) -> None:
    tree = SMALL | {"patch": 16} | change
    tensors = run_of(tmp_path / "run", tree, size=size)
    with pytest.raises(UserError, match=message):
        consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface")
    assert not (tmp_path / "hf").exists()
    # Our own format can, and so can a published file with its JSON.
    for to in ("safetensors", "published"):
        consolidate(tmp_path / "run", tmp_path / to, to=to, weights="target")  # type: ignore[arg-type]
        assert same(all_of(tmp_path / to), one_encoder(tensors))
        assert read_config(tmp_path / to).model == model(tree)


# -- a probe -----------------------------------------------------------------------------------------


def random_probe(**options: Any) -> AttentiveProbe:
    torch.manual_seed(2)
    probe = AttentiveProbe(**({"width": 48, "heads": 3, "classes": 5, "eps": 1e-6} | options)).eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return probe


@torch.no_grad()
@pytest.mark.parametrize("depth", [4, 2])
def test_a_probe_classifies_as_theirs(tmp_path: Path, depth: int) -> None:
    run_of(tmp_path / "run", SMALL)
    probe, classes = random_probe(depth=depth), ["a", "b", "c", "d", "e"]
    folder = write_video_classifier(tmp_path / "hf", open_weights(tmp_path / "run"), probe, classes)
    theirs, info = VJEPA2ForVideoClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.id2label == dict(enumerate(classes))
    clips = torch.randn(2, 3, 8, 32, 32)
    logits = probe(load_encoder(tmp_path / "run")(clips))
    assert relative_difference(theirs.eval()(clips.transpose(1, 2)).logits, logits) < RELATIVE
    # Its encoder and predictor load, the head is left out by name.
    source = open_weights(folder)
    assert source.ignored == ("classifier", "pooler")
    assert same(all_of(folder), one_encoder(random_tensors(model(SMALL), 0)))
    for to in ("huggingface", "safetensors"):
        with pytest.raises(UserError, match="holds the target encoder"):
            consolidate(tmp_path / "run", folder, to=to)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "4 heads, theirs as many as the encoder: 3"),
        ({"eps": 1e-5}, "eps 1e-05, theirs 1e-06"),
        ({"width": 24}, "24 wide, the encoder 48"),
        ({"mlp_hidden": 100}, "100 hidden channels, theirs 192"),
        ({"classes": 4}, "4 outputs, and there are 5 names"),
    ],
)
def test_a_probe_that_their_head_cannot_express_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    run_of(tmp_path / "run", SMALL)
    with pytest.raises(UserError, match=message):
        write_video_classifier(tmp_path / "hf", open_weights(tmp_path / "run"), random_probe(**options), list("abcde"))
    assert not (tmp_path / "hf").exists()


# -- the folder that is written ----------------------------------------------------------------------


def test_a_failure_at_the_end_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vjepa_scale.core import files

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    run_of(tmp_path / "run", SMALL)
    out = consolidate(tmp_path / "run", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(files, "_rename", full_disk)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            consolidate(tmp_path / "run", folder)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("to", ["huggingface", "published"])
def test_only_the_same_result_is_written_over(tmp_path: Path, to: Any) -> None:
    run_of(tmp_path / "run", SMALL)
    out = consolidate(tmp_path / "run", tmp_path / "out", to=to, weights="target")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    weights = "model.pt" if to == "published" else "model.safetensors"
    (out / weights).write_bytes(b"damaged")
    consolidate(tmp_path / "run", out, to=to, weights="target")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    for options, message in (
        ({"to": to, "weights": "context"}, "not the context encoder"),
        ({"to": to, "weights": "target", "dtype": "bfloat16"}, "not the target encoder .* in bfloat16"),
        ({"to": "safetensors"}, f"in the format {to}"),
    ):
        with pytest.raises(UserError, match=message):
            consolidate(tmp_path / "run", out, **options)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"also notes\.txt"):
        consolidate(tmp_path / "run", out, to=to, weights="target")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {"notes.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_command_line(tmp_path: Path) -> None:
    tensors = run_of(tmp_path / "run", SMALL)

    run_tool = partial(tool, "consolidate", check=False)
    done = run_tool(tmp_path / "run", "--to", "huggingface", "--out", tmp_path / "hf")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, last = done.stdout.splitlines()
    assert first.startswith("Hugging Face's predictor uses mask token 1. It was trained by")
    assert second.startswith("checked against transformers: features differ by")
    assert last == f"written: {tmp_path / 'hf'}: the target encoder of pretrain at step 4"

    torch.save(published_dict(tensors), tmp_path / "foreign.pt")
    out = tmp_path / "back"
    refused = run_tool(tmp_path / "foreign.pt", "--out", out)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {tmp_path}/foreign.pt: its encoder is 2 deep and 48 wide; the number of heads is not in such a file "
        "(give --model vit_giant (or another name), or --model heads=22 with the number of heads)\n"
    )
    model_option = ("--model", "heads=3,predictor_heads=2")
    done = run_tool(tmp_path / "foreign.pt", *model_option, "--out", out, "--encoder-only", "--weights", "context")
    assert (done.returncode, done.stderr) == (0, "")
    count = sum(name.startswith("encoder.") for name in tensors)
    assert done.stdout.splitlines() == [
        f"{tmp_path}/foreign.pt: {count} tensors match, 0 missing, 0 unexpected, 0 of another shape, "
        "1 ignored by name (pos_embed)",
        f"written: {out}: the context encoder of foreign.pt",
    ]
    context = {name: value for name, value in tensors.items() if name.startswith("encoder.")}
    assert same(load_file(out / "model.safetensors"), context)
    refused = run_tool(out, "--to", "huggingface", "--out", tmp_path / "x")
    assert refused.returncode == 2
    assert "there is no predictor" in refused.stderr


def test_a_folder_that_says_one_thing_and_holds_another_is_refused(tmp_path: Path) -> None:
    theirs = random_published(model(SMALL), crop=32, frames=4, seed=0)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refuses(change: dict[str, Any], message: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            open_weights(tmp_path)

    refuses({"num_hidden_layers": 3}, r": 2 blocks in the file, 3 in the model; 91 tensors match, 16 missing, 0")
    refuses({"model_type": "vit"}, "model_type 'vit'")
    refuses({"hidden_act": "silu"}, "hidden_act: 'silu'")
    refuses({"hidden_size": "wide"}, "config.json")
    refuses({"mlp_ratio": 2.0}, "of another shape")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="encoder: 3 heads in the file, 2 in the recipe"):
        open_weights(tmp_path, model=model(SMALL | {"encoder": SMALL["encoder"] | {"heads": 2}}))
    with pytest.raises(UserError, match=r"rope\.layout tiled in the file, interleaved in the recipe"):
        open_weights(tmp_path, model=model(SMALL | {"rope": {"layout": "interleaved"}}))
    (tmp_path / "vjepa_scale.json").write_text(
        read_config(tmp_path).model_copy(update={"model": model(OTHER)}).model_dump_json()
    )
    with pytest.raises(UserError, match=r"encoder: 2 blocks in the file, 3 in vjepa_scale\.json"):
        open_weights(tmp_path)
    (tmp_path / "vjepa_scale.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"encoder.strange": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 unexpected.*encoder\.strange is unexpected"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        load_encoder(tmp_path)
