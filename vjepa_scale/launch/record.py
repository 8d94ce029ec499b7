"""Records a launch: the resolved recipe that its jobs read, the code that they run, and the source of both."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vjepa_scale.core.files import write_atomic, write_json
from vjepa_scale.launch.snapshot import code_folder, new_launch_folder, snapshot_code, source_state
from vjepa_scale.recipe import Recipe, Stage, recipe_yaml


@dataclass(frozen=True)
class Launch:
    """The files of one launch.

    folder: ``<run>/launches/0001``
    recipe: the resolved recipe, which jobs read; later changes of the user's file do not affect them
    code:   the folder from which jobs import vjepa_scale
    """

    folder: Path
    code: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def withdraw(self) -> None:
        """Removes the record of a launch that failed."""
        shutil.rmtree(self.folder)


def record_launch(stages: Sequence[Stage], *, cluster: str) -> Launch:
    """Writes the record of a launch, and the run's ``recipe.yaml``, before anything starts."""
    recipe = stages[0].recipe
    run = Path(recipe.run.dir).absolute()
    code = snapshot_code(run)
    launch = Launch(new_launch_folder(run), code)
    try:
        facts, patch = source_state()
        names = [stage.name for stage in stages]
        write_json(launch.folder / "source.json", {"cluster": cluster, "stages": names, **facts})
        if patch:
            write_atomic(launch.folder / "source.patch", patch)
        for path in (launch.recipe, run / "recipe.yaml"):
            write_atomic(path, recipe_yaml(recipe))
    except OSError:
        launch.withdraw()
        raise
    return launch


def planned_launch(recipe: Recipe) -> Launch:
    """Returns the next launch without writing anything."""
    run = Path(recipe.run.dir).absolute()
    taken = [int(path.name) for path in (run / "launches").glob("*") if path.name.isdigit()]
    return Launch(run / "launches" / f"{max(taken, default=0) + 1:04d}", code_folder(run))
