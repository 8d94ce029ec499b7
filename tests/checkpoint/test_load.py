"""Consolidated checkpoints: what the writer writes, the safetensors library reads; what does not fit is refused."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from vjepa_scale import load_encoder
from vjepa_scale.checkpoint.load import (
    CONFIG_FILE,
    METADATA_KEY,
    WEIGHTS_FILE,
    ConsolidatedConfig,
    load_predictor,
    read_config,
    write_consolidated,
)
from vjepa_scale.checkpoint.safetensors_writer import write_safetensors
from vjepa_scale.core.errors import UserError
from vjepa_scale.model import Encoder, Predictor, initialise
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig, RopeConfig

MODEL = ModelConfig(
    encoder=EncoderConfig(width=48, depth=2, heads=2),
    predictor=PredictorConfig(width=24, depth=1, heads=2, mlp_hidden=96, mask_tokens=3),
    patch=8,
    rope=RopeConfig(layout="interleaved"),
)


def _config(model: ModelConfig = MODEL) -> ConsolidatedConfig:
    return ConsolidatedConfig(
        model=model,
        weights="target",
        stage="cooldown",
        step=120,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        frames=8,
        size=(48, 64),
        fps=4.0,
        recipe={"run": {"seed": 3}},
    )


def _weights() -> dict[str, Tensor]:
    encoder, predictor = Encoder(MODEL), Predictor(MODEL)
    initialise(encoder, seed=0, prefix="encoder")
    initialise(predictor, seed=0, prefix="predictor")
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    return weights | {f"predictor.{k}": v for k, v in predictor.state_dict().items()}


def _write(folder: Path, weights: dict[str, Tensor], config: ConsolidatedConfig | None = None) -> Path:
    entries = [(name, tuple(value.shape), value.dtype) for name, value in weights.items()]
    write_consolidated(folder, config or _config(), entries, weights.__getitem__)
    return folder


# -- the streaming writer --------------------------------------------------------------------------


def test_library_reads_every_dtype_and_odd_size(tmp_path: Path) -> None:
    tensors = {
        "one byte": torch.tensor([7], dtype=torch.uint8),
        "three": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True, True, False]),
        "half": torch.randn(5, 7).half(),
        "double": torch.randn(2, 3, 5, dtype=torch.float64),
        "ints": torch.arange(-3, 4),
        "int32": torch.arange(9, dtype=torch.int32).reshape(3, 3),
        "int16": torch.tensor([-(2**15), 2**15 - 1], dtype=torch.int16),
        "int8": torch.tensor([-128, 127, 1], dtype=torch.int8),
        "transposed": torch.randn(4, 6).t(),
        "ümlaut": torch.randn(11),
    }
    path = tmp_path / "deep" / "x.safetensors"
    entries = [(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
    write_safetensors(path, entries, tensors.__getitem__, {"format": "pt", "note": 'with "quotes"'})
    read = safetensors.torch.load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name
    with safe_open(path, framework="pt") as archive:
        assert archive.metadata() == {"format": "pt", "note": 'with "quotes"'}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    table = json.loads(path.read_bytes()[8 : 8 + header])
    sizes = {name: value.element_size() for name, value in tensors.items()}
    assert all((8 + header + table[name]["data_offsets"][0]) % sizes[name] == 0 for name in tensors)


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    given: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def read(name: str) -> Tensor:
        alive.append(sum(reference() is not None for reference in given))
        value = torch.full((1000,), float(name))
        given.append(weakref.ref(value))
        return value

    write_safetensors(tmp_path / "x.safetensors", [(str(i), (1000,), torch.float32) for i in range(50)], read)
    assert alive == [0] * 50
    assert float(safetensors.torch.load_file(tmp_path / "x.safetensors")["49"][-1]) == 49


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda name: torch.zeros(3), "announced as"),
        (lambda name: torch.zeros(2, dtype=torch.float64), "announced as"),
    ],
)
def test_a_failure_leaves_what_was_there(tmp_path: Path, read: Callable[[str], Tensor], message: str) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("a", (2,), torch.float32)], lambda name: torch.ones(2))
    with pytest.raises(ValueError, match=message):
        write_safetensors(path, [("a", (2,), torch.float32)], read)
    assert torch.equal(safetensors.torch.load_file(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a comes twice"):
        write_safetensors(tmp_path / "x", [("a", (1,), torch.float32)] * 2, lambda name: torch.ones(1))


# -- loading ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_folder_and_bare_file_load_to_the_same_networks(tmp_path: Path) -> None:
    weights = _weights()
    folder = _write(tmp_path / "out", weights)
    bare = tmp_path / "renamed.safetensors"
    bare.write_bytes((folder / WEIGHTS_FILE).read_bytes())
    for source in (folder, str(folder), bare):
        encoder, predictor = load_encoder(source), load_predictor(source)
        assert not encoder.training
        assert read_config(source).model.rope.layout == "interleaved"
        loaded = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
        loaded |= {f"predictor.{k}": v for k, v in predictor.state_dict().items()}
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert encoder(torch.randn(2, 3, 4, 16, 24)).shape == (2, 2 * 2 * 3, 48)


def test_configuration_is_in_both_files(tmp_path: Path) -> None:
    folder = _write(tmp_path, _weights())
    assert read_config(folder) == read_config(folder / WEIGHTS_FILE) == _config()
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as archive:
        assert json.loads(archive.metadata()[METADATA_KEY]) == json.loads((folder / CONFIG_FILE).read_text())


def test_bfloat16_file_loads_as_float32(tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in _weights().items()}
    encoder = load_encoder(_write(tmp_path, weights))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.norm.weight, weights["encoder.norm.weight"].float())


@torch.no_grad()
def test_changing_a_loaded_encoder_leaves_the_file_alone(tmp_path: Path) -> None:
    weights = _weights()
    folder = _write(tmp_path, weights)
    for parameter in load_encoder(folder).parameters():
        parameter.add_(1)
    name = "encoder.blocks.1.attn.qkv.weight"
    assert torch.equal(safetensors.torch.load_file(folder / WEIGHTS_FILE)[name], weights[name])


def test_what_does_not_match_is_counted(tmp_path: Path) -> None:
    weights = _weights()
    count = sum(name.startswith("encoder.") for name in weights)
    del weights["encoder.norm.bias"]
    weights["encoder.extra.weight"] = torch.zeros(1)
    weights["encoder.blocks.0.attn.proj.bias"] = torch.zeros(7)
    folder = _write(tmp_path, weights)
    expected = rf"{count - 2} tensors match, 1 missing, 1 unexpected, 1 of another shape: .*norm\.bias is missing"
    with pytest.raises(UserError, match=expected):
        load_encoder(folder)


def test_wrong_depth_is_refused(tmp_path: Path) -> None:
    deeper = MODEL.model_copy(update={"encoder": EncoderConfig(width=48, depth=3, heads=2)})
    with pytest.raises(UserError, match=r"28 tensors match, 12 missing, 0 unexpected.*encoder\.blocks\.2"):
        load_encoder(_write(tmp_path, _weights(), _config(deeper)))


def _missing(path: Path) -> Path:
    return path / "nowhere"


def _run_folder(path: Path) -> Path:
    (path / "pretrain" / "checkpoints").mkdir(parents=True)
    (path / "pretrain" / "recipe.yaml").write_text("{}")
    return path


def _raw_checkpoint(path: Path) -> Path:
    folder = path / "step_00000100"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"")
    return folder


def _pickle(path: Path) -> Path:
    torch.save({"encoder": {}}, path / "vitl.pt")
    return path / "vitl.pt"


def _other_project(path: Path) -> Path:
    safetensors.torch.save_file({"encoder.layer.0.norm1.weight": torch.ones(2)}, path / WEIGHTS_FILE, {"format": "pt"})
    return path


def _cut_short(path: Path) -> Path:
    _write(path, _weights())
    content = (path / WEIGHTS_FILE).read_bytes()
    (path / WEIGHTS_FILE).write_bytes(content[:-100])
    return path


def _future_version(path: Path) -> Path:
    content = _config().model_dump(mode="json") | {"version": 9}
    safetensors.torch.save_file({"a": torch.ones(2)}, path / WEIGHTS_FILE, {METADATA_KEY: json.dumps(content)})
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "no such file or folder"),
        (_run_folder, r"no checkpoint in it \(give a run, a stage or a checkpoint folder\)"),
        (_raw_checkpoint, r"step_00000100.*file not found"),
        (_pickle, r"vitl\.pt.*no patch_embed\.proj\.weight"),
        (_other_project, "not of this project"),
        (_cut_short, "not a whole safetensors file"),
        (_future_version, "9; this program reads"),
        (lambda path: path, r"no checkpoint in it"),
    ],
)
def test_other_things_are_named_for_what_they_are(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(path)
    assert str(tmp_path) in str(error.value)
