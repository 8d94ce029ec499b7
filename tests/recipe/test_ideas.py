"""docs/ideas.md says what there is: names, commands and overrides are there, and what is "not built" has no key."""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from vjepa_scale.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ideas.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
IDEAS = [row for row in ROWS if row[0] != "idea" and set(row[0]) != {"-"}]
SPANS = [span for row in IDEAS for span in re.findall(r"`([^`]+)`", row[-1])]
OVERRIDES = [span for span in SPANS if "=" in span]
COMMANDS = [span for span in SPANS if span.startswith("python ")]
KEYS = (
    ROOT / "docs" / "recipe_keys.md"
).read_text()  # every key with its choices; test_recipes.py holds it to the schema
# What a key, a choice or a file of the idea would be called, by the beginning of its row. A row that says "not built"
# or "no …" of something has an entry; the page is wrong once one of these is found.
WOULD_BE_CALLED = {
    "Variable lengths": r"navit|packed|packing",
    "Context from one block": r"context_(block|scale)|separate_targets",
    "Dense loss": r"dense|context_(loss|weight)|lambda",
    "Deep self-supervision": r"deep_|target_(layers|depths|blocks)|norms_block",
    "Pixels as targets": r"pixel_loss|reconstruct|target_kind|mae\b",
    "Predictions conditioned on augmentations": r"iwm|condition_on_aug|augmentation_token",
    "A latent variable": r"latent",
    "Smooth L1": r"smooth|huber|loss_kind",
    "Frozen teacher": r"teacher",
    "Distillation": r"distil|teacher",
    "Variance and covariance": r"vicreg|sigreg|variance|covariance_|contrastive|info_nce",
    "Optimisers other than AdamW": r"muon|\blars\b|layer_?wise|layer_decay",
    "Augmentation": r"jitter_|colou?r",
    "Separate patch and modality": r"modality|image_patch",
    "Factorised attention": r"factori|divided",
    "Class token": r"class_token|register|layer_?scale|drop_?path",
    "Hierarchical JEPA": r"hierarch|levels",
    "Fine-tuning": r"fine_?tun|unfreeze|detection|segmentation",
    "Language": r"language|\bllm|\btext_",
    "Surprise": r"intphys",
    "Tensor, sequence": r"tensor_parallel|sequence_parallel|context_parallel|pipeline|\btp\b",
    "bfloat16 over float32": r"fp8|float8",
}


def test_what_is_not_built_has_no_key_and_no_module() -> None:
    denied = [row for row in IDEAS if row[1] != "yes" or re.search(r"\bno\b(?! number)", row[2])]
    modules = "\n".join(str(path.relative_to(ROOT)) for path in (ROOT / "vjepa_scale").rglob("*.py"))
    keys = "\n".join(line for line in KEYS.splitlines() if line.startswith("| `"))
    for row in denied:
        patterns = [pattern for idea, pattern in WOULD_BE_CALLED.items() if row[0].startswith(idea)]
        assert patterns or row[1] == "yes" or row[0].startswith("Image JEPA"), f"{row[0]!r} is not in WOULD_BE_CALLED"
        for pattern in patterns:
            found = re.search(pattern, keys + modules, re.IGNORECASE)
            assert not found, f"{row[0]!r} is said to be missing, but there is {found[0]!r}"
    stale = [idea for idea in WOULD_BE_CALLED if not any(row[0].startswith(idea) for row in denied)]
    assert not stale


def test_every_row_says_whether_it_is_here() -> None:
    assert len(IDEAS) > 60
    for row in IDEAS:
        assert len(row) == 3, row
        assert row[1] in ("yes", "partly", "not built"), row
        assert row[2], row


@pytest.mark.parametrize("span", OVERRIDES)
def test_overrides_are_valid(span: str) -> None:
    load_recipe(ROOT / "recipes" / "vitl_256.yaml", shlex.split(span))  # as a shell would split it


@pytest.mark.parametrize("span", COMMANDS)
def test_commands_know_their_flags(span: str) -> None:
    _, tool, *words = shlex.split(span)
    source = (ROOT / re.findall(r"vjepa_scale/commands/\w+\.py", (ROOT / tool).read_text())[0]).read_text()
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag}"' in source


@pytest.mark.parametrize("span", [span for span in SPANS if re.fullmatch(r"vjepa_scale(\.\w+)+", span)])
def test_names_are_importable(span: str) -> None:
    pkgutil.resolve_name(span)


def test_files_exist() -> None:
    named = re.findall(r"\b(?:recipes|tools|tests|docs)/[\w/]+\.(?:yaml|py|md)\b", PAGE)
    linked = [f"docs/{target.partition('#')[0]}" for target in re.findall(r"\]\(([^)]+)\)", PAGE)]
    assert named
    assert linked
    for path in named + linked:
        assert (ROOT / path).is_file(), path
