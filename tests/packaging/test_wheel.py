"""The wheel: what is in it, and its commands in an environment and a folder that have no checkout."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.chain import RECIPE, ROOT
from tests.processes import LIMIT_S
from tests.videos import encoded

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "vjepa_scale", "recipes", "slurm")
Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by pip, without an index, from a copy of the checkout: a build writes into the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, source)
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def shell(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Runs a command of a new environment that has the wheel, in a folder that has no checkout."""
    folder = tmp_path_factory.mktemp("a user")
    environment = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python3*/site-packages")
    flags = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, wheel, cwd=folder)
    # The dependencies of this environment; its own .pth files, of the checkout, are not read there.
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    (folder / "work").mkdir()

    def command(name: str, *words: object, code: int = 0, timeout: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
        return run(environment / "bin" / name, *words, cwd=folder / "work", code=code, timeout=timeout)

    where = command("python", "-c", "import os, vjepa_scale; print(os.getcwd(), vjepa_scale.__file__, sep='\\n')")
    work, imported = where.stdout.splitlines()
    assert Path(imported).is_relative_to(packages)
    assert not Path(work).is_relative_to(ROOT)
    return command


def run(*words: object, cwd: Path, code: int = 0, timeout: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHON", "VJEPA", "PIP_")  # of the test's own process
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, f"{words} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def on_disk(folder: str, pattern: str, inside: str) -> set[str]:
    """Names in the wheel of the files below a folder of the checkout."""
    paths = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob(pattern))
    return {f"{inside}/{path.as_posix()}" for path in paths if not any(part.startswith(".") for part in path.parts)}


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        about = archive.read(metadata).decode()
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(metadata.replace("METADATA", "entry_points.txt")).decode())
    code = on_disk("vjepa_scale", "*.py", "vjepa_scale") | on_disk("vjepa_scale", "*.sh", "vjepa_scale")
    recipes = on_disk("recipes", "*.yaml", "vjepa_scale/recipes")
    profiles = on_disk("slurm/profiles", "*.yaml", "vjepa_scale/profiles")
    page = {f"vjepa_scale/report/page.{kind}" for kind in ("html", "css", "js")}
    assert names == code | recipes | profiles | page
    assert "vjepa_scale/launch/epilogue.sh" in names
    assert {"vjepa_scale/recipes/demo.yaml", "vjepa_scale/profiles/example_h100.yaml"} <= names
    commands = "launch shards consolidate evaluate features surprise plan report demo"
    assert set(scripts["console_scripts"]) == {f"vjepa-{name}" for name in commands.split()}
    extras = set(re.findall(r"^Provides-Extra: (.*)$", about, re.MULTILINE))
    assert extras == {
        "torchcodec",
        "flash-attn",
        "flash-attn-4",
        "deepspeed",
        "huggingface",
        "wandb",
        "tensorboard",
        "dev",
    }


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "vjepa_scale").rglob("__init__.py")}
    assert set(listed) == {name.replace("/", ".") for name in there} | {"vjepa_scale.recipes", "vjepa_scale.profiles"}


def test_a_plan_from_any_folder(shell: Shell) -> None:
    """Of a shipped recipe, by name; hints name the commands that an installation has."""
    done = shell("vjepa-launch", "demo", "--dry-run", "launch.profile=example_h100", "--cluster", "local", code=2)
    assert "cluster local, profile example_h100 (partition" in done.stdout
    refusal = done.stdout.splitlines()[-1]
    assert refusal.startswith("refused now: ")
    assert "site-packages/vjepa_scale/recipes/demo.yaml:data.sets.synthetic.path" in refusal
    assert refusal.endswith("(write shards with vjepa-shards VIDEOS OUT)")


def test_the_same_from_an_editable_installation(tmp_path: Path) -> None:
    console = Path(sys.executable).with_name("vjepa-launch")
    if not console.exists():
        pytest.skip("this environment was made before there were console commands: make dev")
    (tmp_path / "mine.yaml").write_text("extends: demo\npretrain: {steps: 710}\n")
    done = run(console, "mine.yaml", "--dry-run", cwd=tmp_path, code=2)
    assert "pretrain: 710 steps" in done.stdout
    assert done.stdout.endswith("(write shards with vjepa-shards VIDEOS OUT)\n")
    tool = run(sys.executable, ROOT / "tools" / "launch.py", "mine", "--dry-run", cwd=tmp_path, code=2)
    assert tool.stdout == done.stdout.replace("vjepa-shards", "tools/make_shards.py")


@pytest.mark.slow
def test_shards_a_run_and_its_weights(shell: Shell, tmp_path: Path) -> None:
    assert shell("vjepa-launch", "status", "--help").stdout.startswith("usage: vjepa-launch status ")
    for name in ("launch", "shards", "consolidate", "features", "evaluate", "surprise", "plan", "demo"):
        text = shell(f"vjepa-{name}", "--help").stdout
        assert text.startswith(f"usage: vjepa-{name} ")
        assert "tools/" not in text
    (tmp_path / "videos").mkdir()
    for number in range(8):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(encoded(20 + number))
    shell("vjepa-shards", tmp_path / "videos", tmp_path / "shards", "--workers", 1)
    phases = [{"name": "all", "start_lr": 1e-4}]
    tree = {name: RECIPE[name] for name in ("engine", "data", "model", "masks", "jepa", "launch")}
    sets = {"mine": {"path": str(tmp_path / "shards")}}
    tree |= {"run": {"dir": str(tmp_path / "run")}, "data": {**RECIPE["data"], "sets": sets}}
    clip = {"frames": 4, "size": [32, 40]}
    tree["pretrain"] = {"steps": 2, "clip": clip, "global_batch": 4, "micro_batch": 2, "phases": phases}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    said = shell("vjepa-launch", tmp_path / "mine.yaml").stdout  # in the background
    assert f"look after it with: vjepa-launch status|follow|cancel {tmp_path / 'run'}" in said
    shell("vjepa-launch", "follow", tmp_path / "run")
    assert "pretrain" in shell("vjepa-launch", "status", tmp_path / "run").stdout
    # The ranks ran a copy of the installed package.
    (code,) = (tmp_path / "run" / "code").iterdir()
    for part in ("launch/epilogue.sh", "training/trainer.py", "recipes/demo.yaml"):
        assert (code / "vjepa_scale" / part).is_file()
    shell("vjepa-consolidate", tmp_path / "run", "--out", tmp_path / "weights")
    program = (
        "import sys, torch, vjepa_scale as v; print(v.load_encoder(sys.argv[1])(torch.zeros(1, 3, 4, 32, 40)).shape)"
    )
    assert shell("python", "-c", program, tmp_path / "weights").stdout.endswith("torch.Size([1, 40, 48])\n")
