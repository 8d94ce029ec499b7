"""Files that are damaged, or made by others, in ways that no checksum tells: one error that names the file, at once."""

import copy
import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.formats_material import SMALL, run_of
from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.consolidate import consolidate
from vjepa_scale.checkpoint.dcp import CheckpointReader
from vjepa_scale.checkpoint.formats import open_weights
from vjepa_scale.checkpoint.load import load_probe
from vjepa_scale.checkpoint.manifest import MANIFEST, describe_file, read_manifest, write_manifest
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json, read_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DEEP, DIGITS = "[" * 100_000, '{"a": ' + "9" * 5000 + "}"


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        act()
    line = str(raised.value)
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and its weights in the formats of others."""
    folder = tmp_path_factory.mktemp("exported")
    run_of(folder / "run", SMALL)
    for to in ("safetensors", "huggingface", "published"):
        consolidate(folder / "run", folder / to, to=to, check=False)  # type: ignore[arg-type]
    return folder


# -- JSON ----------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "hostile",
    "JSON of 100,000 levels, of numbers with 5,000 digits, or none, in the place of any JSON",
    "one error that names the file, at once",
)
@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 100_000, DIGITS, "\0", ""], ids=lambda text: text[:12] or "empty")
def test_json_that_is_none(text: str, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    assert refusal(lambda: read_json(path)).startswith(f"{path}: not valid JSON")
    path.write_text(f"{text}\n[1]\n3\n" + '{"row": 1}\n')
    assert list(read_jsonl(path)) == [{"row": 1}]

    # Every JSON of every format, in its place.
    for file in (
        "huggingface/vjepa_scale.json",
        "huggingface/video_preprocessor_config.json",
        "published/model.pt.json",
        f"run/pretrain/checkpoints/step_00000004/{MANIFEST}",
        "run/pretrain/checkpoints/step_00000004/__0.sha256",
    ):
        folder = tmp_path / "copy"
        shutil.copytree(exported, folder)
        if file.startswith("huggingface/video"):
            (folder / "huggingface/vjepa_scale.json").unlink()
        (folder / file).write_text(text)
        assert Path(file).name in refusal(lambda: open_weights((folder / file).parent)), file  # noqa: B023
        if file.endswith(".sha256"):  # whoever reads tensors later does not verify the file again
            assert "__0.sha256" in refusal(lambda: CheckpointReader((folder / file).parent))  # noqa: B023
        shutil.rmtree(folder)
    shutil.copytree(exported / "huggingface", tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(text)
    refusal(lambda: open_weights(tmp_path / "hf"))
    (tmp_path / "hf/config.json").write_text((exported / "huggingface/config.json").read_text())
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/other.safetensors")
    (tmp_path / "hf/model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(lambda: open_weights(tmp_path / "hf"))


def test_metadata_of_safetensors(exported: Path, tmp_path: Path) -> None:
    tensors, path = load_file(exported / "safetensors/model.safetensors"), tmp_path / "model.safetensors"
    for text in ("no JSON", DEEP, DIGITS, "3", '{"format": 1}'):
        save_file(tensors, path, {"vjepa_scale": text})
        assert refusal(lambda: open_weights(path)).startswith(f"{path}:vjepa_scale")


# -- DCP -----------------------------------------------------------------------------------------------


class _Foreign:
    def __init__(self) -> None:
        self.x = 1


def _with_right_checksums(checkpoint: Path) -> None:
    """The manifest is written anew for the files that lie there now."""
    (checkpoint / "__0.sha256").unlink(missing_ok=True)  # as in checkpoints from before there were checksums of chunks
    manifest = read_manifest(checkpoint)
    files = {path.name: describe_file(path) for path in checkpoint.iterdir() if path.name != MANIFEST}
    own = ("format", "version", "step", "world_size", "mesh", "libraries", "files")
    extra = {key: value for key, value in manifest.items() if key not in own}
    write_manifest(checkpoint, step=manifest["step"], world_size=1, files=files, extra=extra)


@pytest.mark.fault(
    "hostile",
    "a checkpoint with right checksums and other content",
    "one error that names it",
)
@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".metadata", b""),
        (".metadata", b"\x80\x04garbage"),
        (".metadata", b"\x80\x04."),
        (".metadata", pickle.dumps({"a": 1})),
        (".metadata", pickle.dumps(_Foreign())),
        (".metadata", b"\x80\x04" + b"(" * 100_000),
        ("__0_0.distcp", b"no tensors" * 100),
        ("__0_0.distcp", b""),
        ("__0_0.distcp", None),
    ],
)
def test_a_checkpoint_of_others_under_right_checksums(
    file: str, content: bytes | None, exported: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(exported / "run/pretrain/checkpoints/step_00000004", tmp_path / "step_00000004"))
    if content is None:  # a whole file of PyTorch's, which holds a pickle of something else
        buffer = io.BytesIO()
        torch.save({"a": _Foreign()}, buffer)
        length = (checkpoint / file).stat().st_size
        content = buffer.getvalue().ljust(length, b"\0")
    (checkpoint / file).write_bytes(content)
    _with_right_checksums(checkpoint)
    store.verify(checkpoint)
    line = refusal(lambda: consolidate(checkpoint, tmp_path / "out"))
    assert line.startswith(str(checkpoint))
    assert not (tmp_path / "out").exists()
    if file != ".metadata":
        tensors = {
            name: torch.zeros(shape, dtype=dtype)
            for name, (shape, dtype) in CheckpointReader(checkpoint).tensors().items()
        }
        assert refusal(lambda: store.load(checkpoint, tensors)).startswith(str(checkpoint))


@pytest.mark.parametrize("change", [{"files": None}, {"files": {"a": 3}}, {"step": "x"}])
def test_a_manifest_of_others_under_its_right_checksum(change: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(exported / "run/pretrain/checkpoints/step_00000004", tmp_path / "step_00000004"))
    content = json.loads((checkpoint / MANIFEST).read_text())
    del content["checksum"]
    content |= change
    checksum = hashlib.sha256((json.dumps(content, indent=1) + "\n").encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(content | {"checksum": checksum}, indent=1) + "\n")
    assert MANIFEST in refusal(lambda: open_weights(checkpoint))
    assert store.newest_name(tmp_path) is None


# -- Hugging Face --------------------------------------------------------------------------------------

ABSURD: dict[str, Any] = {
    "mlp_ratio": ["a", None, 0, -1, 1e300, float("nan"), True, [1]],
    "pred_mlp_ratio": ["a"],
    "crop_size": [None, "x", 0, -16, [1, 2]],
    "frames_per_clip": [None, 1.5, 0],
    "hidden_size": [1e12, 10**12, None, "a", 0, 2**21],
    "pred_hidden_size": [10**12],
    "num_hidden_layers": [10**9, 1e9, None, "two", 0, 1000],
    "pred_num_hidden_layers": [10**9],
    "num_attention_heads": [None, 0, 10**12],
    "pred_num_mask_tokens": [10**9, None],
    "patch_size": [None, [[8]], [8, 16], [], "8", 10**9],
    "tubelet_size": [None, 10**9],
    "layer_norm_eps": ["a", None],
    "in_chans": [None],
}


@pytest.mark.fault(
    "hostile",
    "a `config.json` with absurd sizes",
    "one error that names the key, before memory is taken",
)
@pytest.mark.parametrize("key", ABSURD)
def test_absurd_values_in_a_config_of_hugging_face(key: str, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "huggingface", tmp_path / "hf"))
    (folder / "vjepa_scale.json").unlink()
    theirs = json.loads((folder / "config.json").read_text())
    open_weights(folder)
    for value in ABSURD[key]:
        (folder / "config.json").write_text(json.dumps({**copy.deepcopy(theirs), key: value}))
        line = refusal(lambda: open_weights(folder))
        # 1,000 blocks may be: the weights tell that they are not.
        named = "2 blocks in the file, 1000 in the model" if value == 1000 else f"config.json:{key}: "
        assert named in line, value


@pytest.mark.parametrize("content", [[], {"image_mean": 3}, {"image_std": [0, 1, 1, 1]}, {"image_mean": ["a", 1, 1]}])
def test_absurd_values_in_a_preprocessor_of_hugging_face(content: Any, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "huggingface", tmp_path / "hf"))
    (folder / "vjepa_scale.json").unlink()
    (folder / "video_preprocessor_config.json").write_text(json.dumps(content))
    assert "video_preprocessor_config.json" in refusal(lambda: open_weights(folder))


def test_sizes_beyond_reason_in_the_other_formats(exported: Path, tmp_path: Path) -> None:
    config = json.loads((exported / "safetensors/config.json").read_text())
    config["model"]["encoder"]["depth"] = 10**9
    save_file(
        load_file(exported / "safetensors/model.safetensors"),
        tmp_path / "model.safetensors",
        {"vjepa_scale": json.dumps(config)},
    )
    assert "model.encoder.depth" in refusal(lambda: open_weights(tmp_path / "model.safetensors"))
    content = torch.load(exported / "published/model.pt", weights_only=True)
    content["encoder"]["module.backbone.blocks.999999999.norm1.weight"] = torch.zeros(48)
    content["target_encoder"] = content["encoder"]
    torch.save(content, tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in refusal(
        lambda: open_weights(tmp_path / "model.pt", model="heads=3,predictor_heads=2")
    )


# -- a probe's result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[]", '{"step": 4}', '{"step": 4, "best": {"probe": 3}}', DEEP])
def test_a_result_of_a_probe_stage_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    assert "evaluation.json" in refusal(lambda: load_probe(tmp_path))
