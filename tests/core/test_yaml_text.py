"""YAML that PyYAML takes without a word, or fails on in its own way, is one error that names file and key."""

from pathlib import Path

import pytest
import yaml

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.yaml_text import parse_yaml
from vjepa_scale.launch.profile import load_profile
from vjepa_scale.recipe import load_recipe

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 10)
)
# Text -> what stands behind the file's name, and what is said.
REFUSED = {
    "pretrain: {steps: 1}\nrun: {}\npretrain: {steps: 2}\n": (":pretrain: ", "is there twice, in lines 1 and 3"),
    "pretrain:\n  clip:\n    size: 1\n    size: 2\n": (":pretrain.clip.size: ", "in lines 3 and 4 (keep one)"),
    "phases:\n- {steps: 1}\n- {steps: 1, name: a, steps: 1}\n": (":phases.1.steps: ", "twice"),
    "a: 1\n'a': 1\n": (":a: ", "twice"),
    "? {a: 1, a: 1}\n: 1\n": (": ", "not readable as YAML"),
    "a: &a [*a]": (":a.0: ", "contains itself"),
    LAUGHS: (":a", "more than 1,000,000 values"),
    "[" * 5000 + "]" * 5000: (": ", "nested too deeply"),
    "a: " + "9" * 5000: (": ", "not readable as YAML"),
    "a: 2024-13-45": (": ", "month"),
    "a: !!timestamp x": (": ", "not readable as YAML"),
    "a: !!bool x": (": ", "not readable as YAML"),
    "a: {": (": ", "not readable as YAML"),
    "a: \x01": (": ", "not readable as YAML"),
}


def line_of(raised: pytest.ExceptionInfo[UserError]) -> str:
    line = str(raised.value)
    assert "\n" not in line
    return line


@pytest.mark.fault(
    "hostile",
    "YAML with aliases that expand to a billion values, that contain themselves, with double keys, or too deep",
    "one error that names file and key",
)
@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:30])
def test_what_is_lost_or_fails_is_one_line(text: str) -> None:
    where, what = REFUSED[text]
    with pytest.raises(UserError) as raised:
        parse_yaml(text, yaml.SafeLoader, where="file.yaml")
    line = line_of(raised)
    assert line.startswith(f"file.yaml{where}")
    assert what in line


def test_everything_else_is_what_pyyaml_makes_of_it() -> None:
    for text in (
        "",
        "a: 1\nb: {a: 2, 1: x, 0.5: y}\nc: [1.5, null, 2024-01-02]\n",
        "base: &base {x: 1, y: 2}\nother: &other {z: 3}\na: {<<: *base, x: 5}\nc: [*base, *base]\n",
        "base: &base {x: 1, y: 2}\nother: &other {z: 3}\nb:\n  <<: *base\n  <<: *other\n",
    ):
        assert parse_yaml(text, yaml.SafeLoader, where="file.yaml") == yaml.safe_load(text)


def test_every_yaml_that_is_read_refuses_a_key_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("pretrain: {steps: 3}\nrun: {dir: a}\npretrain: {steps: 5}\n")
    above = tmp_path / "above.yaml"
    above.write_text("extends: file.yaml\n")
    for recipe in (path, above):
        with pytest.raises(UserError) as raised:
            load_recipe(recipe)
        assert line_of(raised).startswith(f"{path}:pretrain: 'pretrain' is there twice, in lines 1 and 3")
    above.write_text("run: {dir: a}\n")
    with pytest.raises(UserError) as raised:
        load_recipe(above, ["pretrain={clip: {size: 1, size: 2}}"])
    assert line_of(raised).startswith("command line:pretrain.clip.size: 'size' is there twice")
    path.write_text("sbatch: {comment: a, nice: 1, comment: b}\n")
    with pytest.raises(UserError) as raised:
        load_profile(str(path))
    assert line_of(raised).startswith(f"{path}:sbatch.comment: 'comment' is there twice")
