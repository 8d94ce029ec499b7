"""``--compare``: its verdict on folders that transformers wrote, on published files, and on planted errors."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import VJEPA2Model

from tests.chain import tool
from tests.checkpoint.formats_material import SMALL, model, run_of
from tests.model.published import our_weights, random_published
from tests.model.test_probe import random_classifier
from vjepa_scale.checkpoint.consolidate import consolidate
from vjepa_scale.checkpoint.formats import open_weights
from vjepa_scale.checkpoint.load import write_consolidated
from vjepa_scale.commands.consolidate import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HEADS = ("--model", "heads=3,predictor_heads=2")


def run(*words: object) -> tuple[int, str]:
    done = tool("consolidate", "--compare", *words, check=False)
    return done.returncode, done.stdout + (done.stderr if done.returncode == 2 else "")


def relative(report: str, row: str) -> float:
    line = next(line for line in report.splitlines() if line.startswith(row + " "))
    return float(line.removeprefix(row).split()[2])


@pytest.fixture(scope="module")
def theirs() -> VJEPA2Model:
    """Random, with attention that is far from uniform: as uniform as at random, places hardly matter."""
    network = random_published(model(SMALL), crop=32, frames=8, seed=3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".query.weight" in name or ".key.weight" in name:
                parameter *= 8
    return network


@pytest.fixture(scope="module")
def released(theirs: VJEPA2Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "hf"
    theirs.save_pretrained(folder)
    return folder


def published(
    theirs: VJEPA2Model, path: Path, *, predictor: bool = True, second: str = "encoder", change: str | None = None
) -> Path:
    """A ``.pt`` under the published names (the tests' own map). One of its two encoders is noise."""
    encoder, predicts = our_weights(theirs)
    torch.manual_seed(9)
    noise = {name: torch.randn_like(value) * 0.1 for name, value in encoder.items()}
    content: dict[str, Any] = {"encoder": encoder, "target_encoder": encoder, second: noise}
    content |= {"predictor": predicts} if predictor else {}
    content = {
        network: {f"module.backbone.{name}": value.clone() for name, value in state.items()}
        for network, state in content.items()
    }
    if change is not None:
        network, _, name = change.partition(".")
        content[network][f"module.backbone.{name}"] *= 1.5
    torch.save(content | {"opt": None, "epoch": 1}, path)
    return path


def test_a_folder_of_transformers_by_itself(released: Path) -> None:
    code, report = run(released, "--clips", "2")
    assert code == 0, report
    assert "this package loads it through its own reader" in report
    count = len(load_file(released / "model.safetensors"))
    assert f"exported: {count} of {count} tensors equal to the reference's" in report
    assert "clips: 2 (noise), 8 frames of 32×32 pixels" in report
    rows = ("encoder tokens", "predictor outputs", "exported: encoder tokens", "exported: predictor outputs")
    assert all(relative(report, row) < 1e-5 for row in rows)
    assert report.splitlines()[-1].startswith("verdict: agree: encoder tokens, predictor outputs differ by at most")


@pytest.mark.parametrize(("noise", "named"), [("encoder", "target"), ("target_encoder", "context")])
def test_a_published_file_beside_the_released_folder_says_which_encoder_that_holds(
    theirs: VJEPA2Model, released: Path, tmp_path: Path, noise: str, named: str
) -> None:
    code, report = run(published(theirs, tmp_path / "a.pt", second=noise), released, *HEADS)
    assert code == 0, report
    assert "an independent check" in report
    count = len(our_weights(theirs)[0])
    other = {"target": "context", "context": "target"}[named]
    assert f"the {named} encoder: {count} of {count} tensors equal to the reference's, compared" in report
    assert f"the {other} encoder: 0 of {count} tensors equal to the reference's\n" in report


def test_the_reference_says_the_heads_of_a_published_file(theirs: VJEPA2Model, released: Path, tmp_path: Path) -> None:
    assert run(published(theirs, tmp_path / "a.pt"), released)[0] == 0


@pytest.mark.parametrize(
    ("change", "output", "names"),
    [
        (
            "target_encoder.blocks.1.attn.qkv.weight",
            "encoder tokens",
            ("encoder.blocks.1.attn.qkv.weight", "encoder.layer.1.attention.key.weight"),
        ),
        (
            "predictor.mask_tokens.1",
            "predictor outputs",
            ("predictor.mask_tokens.1", "predictor.embeddings.mask_tokens"),
        ),
    ],
)
def test_a_planted_wrong_tensor_is_named(
    theirs: VJEPA2Model, released: Path, tmp_path: Path, change: str, output: str, names: tuple[str, ...]
) -> None:
    code, report = run(published(theirs, tmp_path / "a.pt", change=change), released, *HEADS)
    assert code == 1
    verdict = report.splitlines()[-1]
    assert verdict.startswith("verdict: differ: 1 tensors are not the reference's: ")
    assert all(name in verdict for name in names)
    assert f"{output}" in verdict.partition("reference's: ")[2]
    assert relative(report, output) > 1e-3
    if output == "predictor outputs":  # the encoder is right
        assert relative(report, "encoder tokens") < 1e-5


def test_a_mask_token_that_their_predictor_never_uses_is_compared_too(
    theirs: VJEPA2Model, released: Path, tmp_path: Path
) -> None:
    code, report = run(published(theirs, tmp_path / "a.pt", change="predictor.mask_tokens.2"), released, *HEADS)
    assert code == 1
    assert relative(report, "predictor outputs") < 1e-5
    assert "predictor.mask_tokens.2" in report.splitlines()[-1]


def test_a_published_file_by_itself_goes_through_the_exporter(theirs: VJEPA2Model, tmp_path: Path) -> None:
    path = published(theirs, tmp_path / "a.pt")
    code, report = run(path, *HEADS, "--size", "32", "--frames", "4")
    assert code == 0, report
    assert "through this package's own exporter" in report
    assert "4 frames of 32×32 pixels" in report
    code, report = run(path, "--size", "32")
    assert (code, "give --model vit_giant" in report) == (2, True)


def test_a_file_without_a_predictor(theirs: VJEPA2Model, released: Path, tmp_path: Path) -> None:
    path = published(theirs, tmp_path / "a.pt", predictor=False)
    code, report = run(path, released, *HEADS)
    assert code == 0, report
    assert "predictor outputs: not compared" in report
    assert report.splitlines()[-1].startswith("verdict: agree: encoder tokens differ by at most")
    code, report = run(path, *HEADS, "--size", "32")
    assert code == 2
    assert "as a second path" in report


def test_another_layout_of_rope_differs(released: Path, tmp_path: Path) -> None:
    source = open_weights(released)
    other = source.config.model.model_copy(deep=True)
    other.rope.__dict__["layout"] = "interleaved"
    config = source.config.model_copy(update={"model": other})
    write_consolidated(tmp_path, config, source.entries, source.read)
    code, report = run(tmp_path, released)
    assert code == 1
    assert "rope.layout interleaved" in report.splitlines()[-1]
    assert "encoder tokens, predictor outputs: more than 0.0001 of" in report.splitlines()[-1]
    assert "exported: not compared" in report


def test_a_run_and_its_export(tmp_path: Path) -> None:
    run_of(tmp_path / "run", SMALL)
    consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface", check=False)
    code, report = run(tmp_path / "run", tmp_path / "hf")
    assert code == 0, report
    assert "the target encoder: 28 of 28 tensors equal" in report


@pytest.mark.parametrize("classes", [2, 12])
def test_a_classifier_is_compared_by_its_logits(tmp_path: Path, classes: int) -> None:
    folder = tmp_path / "hf"
    random_classifier(width=64, heads=4, mlp_ratio=4.0, classes=classes).save_pretrained(folder)
    code, report = run(folder)
    assert code == 0, report
    assert relative(report, "logits") < 1e-5
    assert relative(report, "exported: logits") < 1e-5
    count = len(load_file(folder / "model.safetensors"))
    assert f"exported: {count} of {count} tensors" in report


def test_a_video_of_the_user(released: Path, tmp_path: Path, video: Path) -> None:
    code, report = run(released, "--clips", video, "--frames", "4")
    assert code == 0, report
    assert "clips: 1 (videos), 4 frames" in report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "48"), "these weights are for size"),
        (("--frames", "5"), "a multiple of 2, the tubelet"),
        (("--clips", "0"), "1 or more, or video files"),
        (("--clips", "missing.mp4"), "missing.mp4: no such file"),
        (("--device", "cuda:77"), "GPUs found"),
    ],
)
def test_options_that_do_not_fit(released: Path, words: tuple[str, ...], message: str) -> None:
    code, report = run(released, *words)
    assert code == 2
    assert message in report


@pytest.mark.parametrize(
    "words",
    [
        ("x.pt", "--out", "out", "--clips", "a.mp4"),
        ("x.pt", "--out", "out", "--device", "cuda"),
        ("--compare", "x.pt", "--to", "huggingface"),
    ],
)
def test_options_of_another_job_are_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "--compare" in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_compared_is_a_user_error(
    released: Path, theirs: VJEPA2Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deeper = random_published(model(SMALL | {"encoder": SMALL["encoder"] | {"depth": 3}}), crop=32, frames=8, seed=0)
    code, report = run(published(deeper, tmp_path / "b.pt"), released, *HEADS)
    assert code == 2
    assert "3 blocks in the file, 2 in the model" in report
    assert "0 missing, 24 unexpected" in report
    code, report = run(released, tmp_path)
    assert (code, "not a Hugging Face folder" in report) == (2, True)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else found(name, *more)
    )
    code, report = run(released)
    assert (code, "vjepa_scale[huggingface]" in report) == (2, True)
