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

from tests.checkpoint.formats_material import SMALL, run_of
from tests.processes import LIMIT_S
from vjepa_scale.checkpoint.consolidate import consolidate, write_video_classifier
from vjepa_scale.checkpoint.formats import open_weights
from vjepa_scale.checkpoint.load import read_config
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
    folder = write_video_classifier(tmp_path / "probe", open_weights(tmp_path / "run"), probe, list("abcde"))
    logits, said = run_card(folder, clip=tmp_path / "clip.pt", result="logits")
    classifier = VJEPA2ForVideoClassification.from_pretrained(folder).eval()
    expected = classifier(pixel_values_videos=clip[None]).logits
    assert relative_difference(logits, expected) < RELATIVE
    assert said == f"{'abcde'[int(expected.argmax())]}\n"


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
