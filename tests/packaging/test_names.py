"""What a command is called in what it prints, and which file a recipe's or a profile's name means."""

import subprocess
import sys
from pathlib import Path

import pytest

from vjepa_scale.core import installed
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.installed import as_called, command, module_command, module_environment, program
from vjepa_scale.launch.profile import load_profile
from vjepa_scale.recipe import load_recipe
from vjepa_scale.recipe.load import recipe_file

ROOT = Path(__file__).parents[2]
VARIABLE = "VJEPA_CONSOLE_COMMANDS"


@pytest.mark.parametrize(
    ("argv", "variable", "console"),
    [
        (["/opt/venv/bin/vjepa-launch", "status", "RUN"], None, True),
        (["vjepa-consolidate"], None, True),
        (["tools/launch.py", "demo"], None, False),
        (["/checkout/tools/make_shards.py"], "1", False),  # a script that calls the checkout's tools from elsewhere
        (["/run/code/1f/vjepa_scale/launch/worker.py"], None, False),  # a rank
        (["/run/code/1f/vjepa_scale/launch/worker.py"], "1", True),
        (["mine.py"], None, False),
        ([], None, False),
        ([""], "1", True),
    ],
)
def test_the_form_of_a_command(
    argv: list[str], variable: str | None, console: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    names = {"launch": "launch", "make_shards": "shards", "extract_features": "features", "plan": "plan"}
    for tool, name in names.items():
        assert command(tool) == (f"vjepa-{name}" if console else f"python tools/{tool}.py")
        assert program(tool) == (f"vjepa-{name}" if console else f"{tool}.py")
    said = "tools/consolidate.py, python tools/launch.py recipes/demo.yaml; mine/tools/launch.py, tools/mutants.py"
    there = "vjepa-consolidate, vjepa-launch demo; mine/tools/launch.py, tools/mutants.py"
    assert as_called(said) == (there if console else said)


def test_a_program_that_imports_a_wheel_has_no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(installed, "PACKAGE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    monkeypatch.delenv(VARIABLE, raising=False)
    assert command("launch") == "vjepa-launch"


def test_a_process_of_a_command_imports_this_package(tmp_path: Path) -> None:
    """Also where the current folder has files of the same names, as another checkout does."""
    for name in ("vjepa_scale/__init__.py", "yaml.py", "json.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('of the current folder')\n")
    words, environment = module_command("launch", "--help"), module_environment()
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


# In which file of the current folder a recipe is found, or else "shipped"; None: in none.
@pytest.mark.parametrize(
    ("given", "there", "found"),
    [
        ("demo", [], "shipped"),
        ("demo.yaml", [], "shipped"),
        ("demo", ["demo"], "demo"),
        ("demo", ["demo.yaml"], "demo.yaml"),
        ("demo.yaml", ["demo.yaml"], "demo.yaml"),
        ("demo", ["demo/of/mine.yaml"], "shipped"),  # a folder is no recipe
        ("mine", ["mine.yaml"], "mine.yaml"),
        ("sub/mine.yaml", ["sub/mine.yaml"], "sub/mine.yaml"),
        ("sub/demo", [], None),
        ("./demo", [], None),
        ("recipes/demo.yaml", [], None),
        ("dmo", [], None),
        ("", [], None),
    ],
)
def test_a_path_wins_over_a_shipped_recipe(
    given: str, there: list[str], found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = ROOT / "recipes" / "demo.yaml"
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(shipped.read_text())
    monkeypatch.chdir(tmp_path)
    if found is not None:
        assert recipe_file(given).samefile(shipped if found == "shipped" else tmp_path / found)
        return
    with pytest.raises(UserError) as refusal:
        load_recipe(given)
    assert "\n" not in str(refusal.value)
    if given:
        assert "no such recipe" in str(refusal.value)
        for path in (ROOT / "recipes").iterdir():
            assert path.stem in str(refusal.value)
        assert ("did you mean demo?" in str(refusal.value)) == ("d" in given)


def test_a_recipe_elsewhere_extends_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    demo = load_recipe(ROOT / "recipes" / "demo.yaml", ["run.seed=7"])
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.yaml"):
        (mine / "a.yaml").write_text(f"extends: {name}\nrun: {{seed: 7}}\n")
        assert load_recipe("mine/a.yaml") == demo
    (tmp_path / "vitl_256.yaml").write_text("of: the current folder, which does not count\n")
    (mine / "a.yaml").write_text("extends: vitl_256\n")
    assert load_recipe("mine/a.yaml") == load_recipe(ROOT / "recipes" / "vitl_256.yaml")
    (mine / "vitl_256.yaml").write_text("extends: demo\nrun: {seed: 7}\n")  # beside it: this one counts
    assert load_recipe("mine/a.yaml") == demo
    for name in ("vitl_256", "vitl_256.yaml"):  # of the same name as the shipped one that it extends
        (mine / "vitl_256.yaml").write_text(f"extends: {name}\nrun: {{seed: 7}}\n")
        assert load_recipe("mine/a.yaml") == load_recipe(ROOT / "recipes" / "vitl_256.yaml", ["run.seed=7"])
    (mine / "loop.yaml").write_text("extends: loop\n")
    with pytest.raises(UserError, match=r"mine/loop\.yaml:extends: extends itself"):
        load_recipe("mine/loop.yaml")
    (mine / "a.yaml").write_text("extends: vitl256\n")
    with pytest.raises(UserError, match=r"a\.yaml:extends: no such recipe: mine/vitl256 .*did you mean vitl_256\?"):
        load_recipe("mine/a.yaml")


def test_profiles_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_profile(str(ROOT / "slurm" / "profiles" / "example_h100.yaml"))
    assert load_profile("example_h100") == load_profile("example_h100.yaml") == shipped
    with pytest.raises(
        UserError, match=r"no such profile \(.*did you mean example_h100\? profiles in .*/slurm/profiles: .*sandbox"
    ):
        load_profile("example_h10")
    own = tmp_path / "slurm" / "profiles"
    own.mkdir(parents=True)
    (own / "example_h100.yaml").write_text("partition: ours\n")
    (own / "mine.yaml").write_text("partition: mine\n")
    assert load_profile("example_h100").partition == "ours"
    assert load_profile("mine").partition == "mine"
    (tmp_path / "mine").write_text("partition: here\n")
    assert load_profile("mine").partition == "here"
