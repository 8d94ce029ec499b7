"""data.decoder in a whole run: what is missing stops it before its first step, and what is there shows the same."""

from pathlib import Path

import pytest

from tests.chain import launch, metrics, tool, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHORT = {"cooldown": None, "checkpoint": {"every": 3}, "log": {"every": 1}}
STAGE = {
    "steps": 3,
    "clip": {"frames": 4, "size": [32, 40]},
    "global_batch": 8,
    "micro_batch": 4,
    "phases": [{"name": "all", "start_lr": 1e-4}],
}


def test_without_torchcodec_a_run_stops_before_its_first_step(
    two_data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torchcodec that fails as the real one does where FFmpeg's libraries are missing."""
    package = tmp_path / "packages" / "torchcodec"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec. Likely causes:\\n 1. …')\n")
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{Path(__file__).parents[2]}")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "run", two_data_sets, pretrain=STAGE, **SHORT)
    done = tool("launch", recipe, "data.decoder=torchcodec", "--wait", check=False)
    assert done.returncode == 2, done.stderr
    line = next(line for line in (done.stdout + done.stderr).splitlines() if "Could not load libtorchcodec" in line)
    assert "data.decoder" in line
    assert "apt-get install ffmpeg" in line
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((tmp_path / "run").rglob("step_[0-9]*"))
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


@pytest.mark.system("torchcodec")
def test_a_run_with_torchcodec_is_the_run_with_pyav(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    for decoder in ("pyav", "torchcodec"):
        recipe = write_recipe(tmp_path / f"{decoder}.yaml", tmp_path / decoder, two_data_sets, pretrain=STAGE, **SHORT)
        launch(recipe, f"data.decoder={decoder}")
    assert metrics(tmp_path / "pyav", "pretrain") == metrics(tmp_path / "torchcodec", "pretrain")
    assert len(metrics(tmp_path / "pyav", "pretrain")) == 3
