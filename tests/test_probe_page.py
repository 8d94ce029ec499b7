"""docs/probe.md: its three steps run in order, on few videos."""

import json
import re
from pathlib import Path

import pytest

from tests.chain import ROOT, launch, tool
from tests.pages import blocks, file_on

PAGE = "docs/probe.md"
SHARDS, PROBE = re.findall(
    r"^       python tools/(?:make_shards|launch)\.py (.*)$", (ROOT / PAGE).read_text(), re.MULTILINE
)
# As in decide.md: four directions of motion in folders.
SMALLER = ("probe.steps=2", "probe.clip={frames: 4, size: 32}", "probe.global_batch=4", "probe.views={segments: 1}")
FEWER = ("probe.labels_per_class=1", "probe.choose_per_class=null")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_three_steps(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text(file_on("docs/decide.md", "recipes/mine.yaml"))
    (recipe,) = blocks(PAGE, "yaml")
    (tmp_path / "recipes/mine_probe.yaml").write_text(recipe)
    tool("make_synthetic", "data/videos", "--clips", 64, "--val-clips", 8, "--size", 40, "--seconds", 2, cwd=tmp_path)
    tool("make_shards", *SHARDS.replace("VIDEOS", "data/videos/train").split(), cwd=tmp_path)
    assert (tmp_path / "data/shards/labelled/val/manifest.json").exists()
    run = (
        "recipes/mine.yaml",
        "data.sets.mine.path=data/shards/labelled/train",
        "pretrain.steps=3",
        "cooldown.steps=2",
    )
    launch(*run, "engine.threads=1", cwd=tmp_path)

    refused = tool("launch", *PROBE.split(), cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert re.search(r"class '\w[^']*' has \d+ examples, fewer than 30", refused.stderr), refused.stderr
    launch(*PROBE.removesuffix(" --wait").split(), *SMALLER, *FEWER, "engine.threads=1", cwd=tmp_path)
    found = json.loads((tmp_path / "runs/mine_probe/probe/evaluation.json").read_text())
    assert found["origin"]["init_from"] == "runs/mine/cooldown"
    assert len(found["settings"]) == 6
