"""What is done without PyTorch: it takes seconds to import, and a login node may not have it."""

import subprocess
import sys

import pytest

from tests.chain import ROOT

LIGHT = [
    "vjepa_scale",
    "vjepa_scale.recipe",
    "vjepa_scale.masking",
    "vjepa_scale.masking.blocks",
    "vjepa_scale.masking.frames",
    "vjepa_scale.monitor.status",
    "vjepa_scale.monitor.follow",
    "vjepa_scale.monitor.cancel",
    "vjepa_scale.launch.plan",
    "vjepa_scale.launch.local",
    "vjepa_scale.launch.slurm",
    "vjepa_scale.launch.shard_jobs",
    "vjepa_scale.launch.shard_worker",
    "tools/launch",
    "tools/make_shards",
    "tools/make_synthetic",
]


def test_launching_watching_and_making_shards_import_no_torch() -> None:
    code = f"""
import importlib, runpy, sys
for name in {LIGHT}:
    if name.startswith("tools/"):
        runpy.run_path(name + ".py")
    else:
        importlib.import_module(name)
    assert "torch" not in sys.modules, name
import vjepa_scale
assert {{"load_model", "load_encoder", "load_world_model", "surprise"}} <= set(vjepa_scale.__all__)
vjepa_scale.load_model
assert "torch" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["vjepa_scale", "vjepa_scale.model"])
def test_lazy_names_are_all_there(package: str) -> None:
    module = __import__(package, fromlist=["*"])
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018
