"""docs/extending.md: its metric is in metrics.jsonl, and its list becomes shards."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.chain import RECIPE, ROOT, metrics, tool, write_recipe
from tests.pages import file_on, registry_line
from tests.processes import LIMIT_S
from tests.shared import checkout_with
from tests.videos import encoded

PAGE = "docs/extending.md"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_metric(two_data_sets: dict[str, Path], tmp_path: Path) -> None:
    """Clips of 2×4×5 tokens, of which a mask of kind future leaves the first time step, 20, as context."""
    text, line = file_on(PAGE, "measured.py"), registry_line(PAGE, "STAGES", "measured")
    checkout = checkout_with(tmp_path, file="objective/measured.py", text=text, registry="STAGES", line=line)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        launch={"tasks_per_node": 2},
        data={"workers": 0},
        masks={"group": 4, "generators": [{"kind": "future", "context_share": [0.5, 0.5]}]},
        pretrain=None,
        cooldown=None,
        seen=RECIPE["pretrain"] | {"kind": "measured", "steps": 2, "phases": [{"name": "all", "start_lr": 1e-3}]},
    )
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "launch.py", recipe, "--wait"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(tmp_path / "run", "seen")
    assert [row["context_tokens"] for row in rows] == [20, 20]
    assert all(0 < row["brightness"] < 1 and row["loss"] > 0 for row in rows)


def test_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "videos").mkdir()
    cameras = {f"{number}.mp4": f"camera {number % 8}" for number in range(16)}
    for number, name in enumerate(cameras):
        (tmp_path / "videos" / name).write_bytes(encoded(8 + number))
    told = [{"file": name, "activity": "walking", "camera": camera, "id": 7} for name, camera in cameras.items()]
    (tmp_path / "annotations.json").write_text(json.dumps(told))
    monkeypatch.chdir(tmp_path)
    exec(compile(file_on(PAGE, "list.py"), "list.py", "exec"), {})
    words = "videos/list.jsonl shards --val 0.25 --val-by camera"
    assert f"    python tools/make_shards.py {words}\n" in (ROOT / PAGE).read_text()
    tool("make_shards", *words.split(), "--workers", 1, cwd=tmp_path)
    sides = {}
    for side in ("train", "val"):
        records = []
        for shard in sorted((tmp_path / "shards" / side).glob("*.tar")):
            with tarfile.open(shard) as archive:
                members = [archive.extractfile(name) for name in archive.getnames() if name.endswith(".json")]
                records += [json.loads(member.read()) for member in members if member is not None]
        sides[side] = {record["metadata"]["camera"] for record in records}
        assert len(records) == 2 * len(sides[side])  # both clips of each camera
    assert not sides["train"] & sides["val"]
    assert sides["train"] | sides["val"] == set(cameras.values())
