"""Statistics of the states and actions that an action stage learns from, for its checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

from vjepa_scale.checkpoint import store
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.data.trajectory_statistics import merged, trajectory_statistics
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe import Phase, Recipe
from vjepa_scale.training.start import Start


def action_statistics(
    recipe: Recipe,
    start: Start,
    phases: Sequence[Phase],
    manifests: Mapping[str, Manifest],
    kept: Mapping[str, Ints],
    ranks: Ranks,
) -> dict[str, Any]:
    """By data set, of all records that the stage draws from, at its rate; empty for other stages.

    Each rank reads its share of the logs, once: a stage that resumes has them in its checkpoint. Collective.
    """
    if phases[0].kind != "action":
        return {}
    if start.kind == "resume" and start.checkpoint is not None:
        known: dict[str, Any] = store.read_manifest(start.checkpoint)["trajectories"]
        return known
    mine = {
        name: trajectory_statistics(manifests[name], records[ranks.rank :: ranks.world_size], recipe.data.fps_of(name))
        for name, records in kept.items()
    }
    everyone = process_group.from_all(mine)
    return {name: merged([part[name] for part in everyone]) for name in mine}
