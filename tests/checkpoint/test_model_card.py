"""What users of an exported model see first: its card, whose code runs, and its configuration."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VJEPA2ForVideoClassification, VJEPA2Model

from tests.chain import tool
from tests.checkpoint.formats_material import SMALL, run_of
from tests.processes import LIMIT_S
from vjepa_scale.checkpoint import consolidate as consolidate_module
from vjepa_scale.checkpoint.consolidate import consolidate, write_video_classifier
from vjepa_scale.checkpoint.formats import open_weights
from vjepa_scale.checkpoint.formats.model_card import ClassifierCard
from vjepa_scale.checkpoint.load import read_config
from vjepa_scale.core.errors import UserError
from vjepa_scale.model.probe import AttentiveProbe

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RELATIVE = 1e-5  # float32 rounding, of the largest output


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def run_card(folder: Path, *, clip: Path, result: str) -> tuple[Any, str]:
    """The card's code in a process of its own, on a clip of ours instead of its noise: one variable; what it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "torchvision" not in code
    code, noise = re.subn(r"torch\.randint\(.*\)(?=  #)", f"torch.load({str(clip)!r})", code)
    assert noise == 1
    script = f"{code}\ntorch.save({result}, 'result.pt')\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "result.pt"), done.stdout


@pytest.mark.slow
@torch.no_grad()
def test_the_code_of_the_card_runs(tmp_path: Path) -> None:
    """On a clip of the model's own size with sides that the crop takes away, so that only colours are computed on."""
    run_of(tmp_path / "run", SMALL)
    consolidate(tmp_path / "run", tmp_path / "hf", to="huggingface")
    wide = torch.randint(0, 256, (8, 3, 32, 44), dtype=torch.uint8)
    torch.save(wide, tmp_path / "clip.pt")
    tokens, said = run_card(tmp_path / "hf", clip=tmp_path / "clip.pt", result="tokens")
    assert said == "torch.Size([1, 64, 48])\n"
    assert "# [1, 64, 48]" in (tmp_path / "hf/README.md").read_text()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225]))
    clip = (wide[..., 6:38] / 255 - mean) / std
    theirs = VJEPA2Model.from_pretrained(tmp_path / "hf").eval()
    expected = theirs(pixel_values_videos=clip[None], skip_predictor=True).last_hidden_state
    assert relative_difference(tokens, expected) < RELATIVE

    probe = AttentiveProbe(width=48, heads=3, classes=5, eps=1e-6).eval()
    for number, parameter in enumerate(probe.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    lines: list[str] = []
    about = ClassifierCard("blocks_1", 0.875, 40, {"probe": {"steps": 7}})
    source = open_weights(tmp_path / "run")
    folder = write_video_classifier(
        tmp_path / "probe", source, probe, list("abcde"), card=about, check=True, say=lines.append
    )
    assert len(lines) == 1
    assert re.match(r"checked against transformers: features .*, predictions .*, logits differ by ", lines[0])
    card = (folder / "README.md").read_text()
    assert "\n# V-JEPA 2 video classifier: 5 classes, on the target encoder of " in card
    assert "`blocks_1`" in card
    assert "Accuracy: 87.50% of 40 clips" in card
    assert "Classes: 0 a, 1 b, 2 c, 3 d, 4 e." in card
    assert "## Recipe of the probe\n```yaml\nprobe: {steps: 7}\n```" in card
    encoders = (tmp_path / "hf/README.md").read_text()
    assert "# V-JEPA 2 video encoder: the target encoder of " in encoders
    assert "classifier:" not in encoders
    assert "Recipe of the probe" not in encoders
    logits, said = run_card(folder, clip=tmp_path / "clip.pt", result="logits")
    classifier = VJEPA2ForVideoClassification.from_pretrained(folder).eval()
    expected = classifier(pixel_values_videos=clip[None]).logits
    assert relative_difference(logits, expected) < RELATIVE
    assert said == f"{'abcde'[int(expected.argmax())]}\n"


@torch.no_grad()
def test_a_classifier_with_wrong_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path / "run", SMALL)
    probe = AttentiveProbe(width=48, heads=3, classes=5, eps=1e-6).eval()
    heads = consolidate_module._their_head

    def swapped(probe: AttentiveProbe) -> dict[str, Tensor]:
        tensors = heads(probe)
        return tensors | {"classifier.weight": tensors["classifier.weight"].flip(0)}

    monkeypatch.setattr(consolidate_module, "_their_head", swapped)
    source = open_weights(tmp_path / "run")
    with pytest.raises(UserError, match=r"transformers computes something else: .*logits differ by"):
        write_video_classifier(tmp_path / "probe", source, probe, list("abcde"), check=True)
    assert not (tmp_path / "probe").exists()


def test_a_run_with_a_probe_stage_only_names_the_folder_to_give(tmp_path: Path) -> None:
    (tmp_path / "mine" / "probe").mkdir(parents=True)
    (tmp_path / "mine" / "probe" / "evaluation.json").write_text("{}")
    done = tool("consolidate", tmp_path / "mine", "--to", "huggingface", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert f"give {tmp_path}/mine/probe, and --to huggingface" in done.stderr


def test_the_configuration_is_printed_in_short_lines(tmp_path: Path) -> None:
    run_of(tmp_path / "run", SMALL)
    consolidate(tmp_path / "run", tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert config.recipe is not None
    lines = str(config).splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 120
    assert "frames: 8" in lines
    assert lines[-1] == f"recipe: {len(config.recipe)} sections, in config.recipe"
    assert len(repr(config)) < 1000  # without the recipe, too
