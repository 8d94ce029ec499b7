"""The data of a stage: the manifests of its data sets, and the order in which their records are drawn."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder, Ints
from vjepa_scale.recipe import Phase, Stage, stages_of


def open_data(stage: Stage) -> dict[str, Manifest]:
    """Opens the manifests of a stage's data sets, in the recipe's order.

    Raises UserError naming the key. Where only this stage needs the missing folder, its fix is to skip the stage.
    """
    manifests = {}
    for name in stage.data_sets:
        path = Path(stage.recipe.data.sets[name].path)
        try:
            manifests[name] = Manifest.open(path)
        except UserError as error:
            fix = str(error.fix) + _without(stage, name) if not path.is_dir() else error.fix
            raise UserError(error.what, where=f"data.sets.{name}.path: {error.where}", fix=fix) from None
    return manifests


def _without(stage: Stage, data_set: str) -> str:
    """Returns a hint to skip the stage where no other stage needs this data set; else an empty string."""
    others = [other for name, other in stages_of(stage.recipe).items() if name != stage.name]
    if not others or any(data_set in other.data_sets for other in others):
        return ""
    return f"; or leave {stage.name!r} out: {stage.name}=null, or --stages {','.join(other.name for other in others)}"


def data_order(
    stage: Stage,
    manifests: Mapping[str, Manifest],
    phases: Sequence[Phase],
    base: Mapping[str, int],
    records: Mapping[str, Ints] | None = None,
    left_out: Iterable[tuple[int, Mapping[str, int]]] = (),
) -> DataOrder:
    """Returns the order of a stage's records over its phases.

    base:    clips of each data set that were drawn before the stage
    records: the result of ``Stage.records``, which is called where this is not given
    left_out: of each rollback, the step that it went to, and the clips of each data set that are left out from there on
    """
    records = stage.records(manifests) if records is None else records
    order = DataOrder(
        seed=stage.recipe.data.seed,
        sets=[(name, manifest.records_of_shards(records.get(name))) for name, manifest in manifests.items()],
        phases=list(phases),
        base=base,
        lanes=stage.recipe.data.lanes,
        kept=records,
    )
    for first, draws in left_out:
        order.leave_out(first, draws)
    return order
