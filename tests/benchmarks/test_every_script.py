"""Every script in benchmarks/ is run by a test, by its own command line at a small size."""

import ast
from pathlib import Path

import pytest

from tests.benchmarks.running import BENCHMARKS, SCRIPTS

# Which tests of this folder, or of faults/, run it; for a module that is no command: which commands use it.
RUN_BY = {
    "checkpoint": {"test_checkpoint_training", "test_checkpoint_consolidation"},
    "clock": {"step"},
    "collapse": {"test_collapse"},
    "encoder": {"test_encoder"},
    "gpu": {"test_gpu_beside_the_published_code"},
    "gpu_book": {"gpu"},
    "gpu_resume": {"gpu"},
    "gpu_rows": {"gpu"},
    "host": {"test_host"},
    "kills": {"test_random_kills"},
    "loader": {"test_loader"},
    "order": {"test_order"},
    "precision": {"test_precision"},
    "published": {"step", "precision"},
    "shards": {"test_shards_beside_tar", "test_shards_of_many_records"},
    "showcase": {"test_showcase_of_finished_runs", "test_showcase_runs_the_demo", "test_showcase_check"},
    "step": {"test_step", "test_step_beside_the_published_code"},
    "surprise": {"test_surprise"},
    "transcode": {"test_transcode"},
    "watching": {"test_watching"},
}
TESTS = {
    node.name
    for folder in (Path(__file__).parent, Path(__file__).parents[1] / "faults")
    for path in folder.glob("test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_run(script: str) -> None:
    assert script in RUN_BY, f"benchmarks/{script}.py: add a test that runs it, and its name to RUN_BY"
    command = "run_command(main)" in (BENCHMARKS / f"{script}.py").read_text() or script == "showcase"
    for by in RUN_BY[script]:
        if command:
            assert by in TESTS, f"no test {by}"
        else:
            assert f"from {script} import" in (BENCHMARKS / f"{by}.py").read_text()


def test_no_script_is_listed_that_is_not_there() -> None:
    assert sorted(RUN_BY) == SCRIPTS
