"""docs/extending.md: a mask generator is one file and one line. A copy of the package gets them, and trains with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chain import ROOT, metrics, write_recipe
from tests.pages import file_on, registry_line
from tests.processes import LIMIT_S
from tests.shared import checkout_with

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PAGE = "docs/extending.md"

# Imported by every Python that starts with this folder on its path: writes down which tokens the predictor is given.
RECORDER = """
import importlib.util, json, os, sys

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name != "vjepa_scale.model.predictor":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loaded(module):
            load(module)
            forward = module.Predictor.forward

            def recorded(self, tokens, context, target, grid, mask_token=0):
                with open(os.environ["RECORD"], "a") as file:
                    row = {"mask_token": mask_token, "context": context.tolist(), "target": target.tolist()}
                    file.write(json.dumps(row) + "\\n")
                return forward(self, tokens, context, target, grid, mask_token)

            module.Predictor.forward = recorded

        spec.loader.exec_module = loaded
        return spec

sys.meta_path.insert(0, Recorder())
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package with one more file and one more line, and the recorder beside it."""
    text = file_on(PAGE, "stripes.py")
    line = registry_line(PAGE, "MASK_GENERATORS", "stripes")
    folder = checkout_with(tmp_path, file="masking/stripes.py", text=text, registry="MASK_GENERATORS", line=line)
    (folder / "sitecustomize.py").write_text(RECORDER)
    return folder


# Prints why each override of argv[2:] is refused, without PyTorch.
REFUSALS = """
import sys
from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe import load_recipe
for override in sys.argv[2:]:
    try:
        load_recipe(sys.argv[1], [override])
    except UserError as error:
        print(error)
"""


def run_from(checkout: Path, recipe: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A Python that imports from the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=recipe.parent,
        env={
            **os.environ,
            "PYTHONPATH": str(checkout),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
            "RECORD": str(checkout / "record.jsonl"),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_one_file_and_one_line_train(two_data_sets: dict[str, Path], tmp_path: Path, checkout: Path) -> None:
    """Clips of 2×4×5 = 40 tokens, two generators with keys of their own, two steps of four micro-batches."""
    periods = (4, 5)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "run",
        two_data_sets,
        masks={"generators": [{"kind": "stripes", "period": period} for period in periods]},
        pretrain={"steps": 2, "phases": [{"name": "all", "start_lr": 1e-3}]},
        cooldown=None,
    )
    done = run_from(checkout, recipe, "-c", REFUSALS, recipe, "masks.multiple_of=2", "masks.generators.0.blocks=3")
    multiple, unknown = done.stdout.splitlines()
    assert "masks: multiple_of: stripes (generators.0) have one length" in multiple
    assert "no key of masks of kind stripes, which have kind, period; it is one of blocks" in unknown

    tool = ROOT / "tools" / "launch.py"
    done = run_from(checkout, recipe, tool, recipe, "--wait", "masks.generators.1.period=3")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "masks.generators.1: the tokens of a clip are no multiple of period" in done.stderr
    assert not (checkout / "record.jsonl").exists()

    done = run_from(checkout, recipe, tool, recipe, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run", "pretrain")] == [0, 1]
    rows = [json.loads(line) for line in (checkout / "record.jsonl").read_text().splitlines()]
    wanted = [
        {
            "mask_token": number,
            "context": [[n for n in range(40) if (n + slot + 10 * step + 5) % period] for slot in slots],
            "target": [[n for n in range(40) if (n + slot + 10 * step + 5) % period == 0] for slot in slots],
        }
        for step in range(2)
        for slots in ((0, 1), (2, 3), (4, 5), (6, 7))
        for number, period in enumerate(periods)
    ]  # the seed of the run is 5
    assert rows == wanted
