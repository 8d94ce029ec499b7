"""Sets up a stage before its first step: data, networks, optimiser, and the weights that it starts from."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vjepa_scale.checkpoint import store
from vjepa_scale.checkpoint.manifest import newest_first
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import remove_dir
from vjepa_scale.core.log import tell
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.host_limits import check_limits
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import DataOrder, Ints
from vjepa_scale.data.stage_data import data_order, open_data
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import Engine, build_engine
from vjepa_scale.objective.objective import Objective
from vjepa_scale.recipe import Phase, Stage
from vjepa_scale.run.ledger import LEDGER, read_spikes
from vjepa_scale.run.metrics import touch
from vjepa_scale.training.attempt_log import AttemptLog
from vjepa_scale.training.load_weights import load_foreign, load_initial
from vjepa_scale.training.skipped_clips import SkippedClips
from vjepa_scale.training.spikes import SpikeGuard, SpikeLog
from vjepa_scale.training.start import Start, find_start, origin_of
from vjepa_scale.video.decode import TORCHCODEC
from vjepa_scale.video.torchcodec import import_torchcodec


@dataclass(frozen=True)
class Training:
    """Everything that a stage trains with.

    start:     where it starts; origin: the source of its initial weights, for its manifests
    phases:    by global steps, from ``start.first``
    manifests: of its data sets; records: those that it draws from, if not all
    skipped:   the clips that were replaced so far
    spikes:    the spikes so far; guard: judges the next steps
    """

    stage: Stage
    ranks: Ranks
    engine: Engine
    objective: Objective
    start: Start
    origin: dict[str, Any]
    phases: list[Phase]
    manifests: Mapping[str, Manifest]
    records: Mapping[str, Ints]
    order: DataOrder
    skipped: SkippedClips
    spikes: SpikeLog
    guard: SpikeGuard
    log: AttemptLog

    @property
    def end(self) -> int:
        """The global step at which the stage ends."""
        return self.phases[-1].end


def set_up(stage: Stage, ranks: Ranks) -> Training:
    """Opens the data, builds the networks, and loads the weights that the stage starts from. Collective.

    Each part has the time limit of set-up for itself (``tell``).
    Raises UserError for errors in data or checkpoints, and for limits of the node.
    """
    recipe, log = stage.recipe, AttemptLog(stage, ranks)
    engine = build_engine(recipe.engine, ranks)
    if ranks.is_main:
        store.remove_unfinished(stage.checkpoints)
        touch(Path(recipe.run.dir) / LEDGER)
    check_limits(stage, ranks_on_node=ranks.local_world_size)
    if recipe.data.decoder == TORCHCODEC:
        import_torchcodec()  # now, not in the first worker
    tell("setup")
    process_group.barrier()
    ledger = Path(recipe.run.dir) / LEDGER
    spikes = SpikeLog(process_group.read_on_rank_0(partial(read_spikes, ledger, stage.name)))
    remove_abandoned(stage.checkpoints, spikes)
    log.say(f"{stage.name}: {ranks.world_size} processes have joined on {engine.device.type}; opening the data")
    tell("setup")
    manifests = open_data(stage)
    tell("setup")
    start = find_start(stage, manifests)
    origin = origin_of(start)  # now, since that checkpoint may be removed during training
    phases = stage.phases_from(start.first)
    records = stage.records(manifests)
    counts = ", ".join(f"{name} {len(records.get(name, range(m.records)))}" for name, m in manifests.items())
    log.say(f"{stage.name}: records: {counts}; building the networks")
    tell("setup")
    objective = stage.objective(engine, manifests, records)
    tell("setup")
    engine.start_optimizer(stage.optimizer_at_start(phases), objective.trained, objective.settings, objective.unreached)
    tell("setup")
    _load(stage, start, engine, objective, log)
    resumed = start.manifest if start.kind == "resume" else None
    tell("setup")
    objective.before_training(resumed)
    tell("setup")
    order = data_order(stage, manifests, phases, start.base, records, spikes.left_out())
    return Training(
        stage=stage,
        ranks=ranks,
        engine=engine,
        objective=objective,
        start=start,
        origin=origin,
        phases=phases,
        manifests=manifests,
        records=records,
        order=order,
        skipped=SkippedClips(Path(recipe.run.dir), stage.name),
        spikes=spikes,
        guard=SpikeGuard(recipe.guards.spikes, (resumed or {}).get("level")),
        log=log,
    )


def remove_abandoned(checkpoints: Path, spikes: SpikeLog) -> None:
    """On rank 0, removes checkpoints that a rollback has left behind: of steps that are trained again."""
    for checkpoint in newest_first(checkpoints) if process_group.is_main() else ():
        with suppress(UserError):  # one whose manifest cannot be read is not used either
            manifest = store.read_manifest(checkpoint)
            if spikes.is_abandoned(manifest["step"], manifest.get("rollbacks", 0)):
                remove_dir(checkpoint)


def load_own(checkpoint: Path, manifest: Mapping[str, Any], engine: Engine, objective: Objective) -> store.LoadReport:
    """Loads networks and optimiser from a checkpoint of ours, whose files have just been verified. Collective."""
    tensors = engine.tensors(objective.networks, optimizer=True)
    report = store.load(checkpoint, tensors, check=False)
    engine.restore(objective.networks, tensors)
    engine.optimizer_steps = manifest["optimizer_steps"]
    return report


def _load(stage: Stage, start: Start, engine: Engine, objective: Objective, log: AttemptLog) -> None:
    """Loads the networks, and for resume and ``continue_from`` the optimiser, from where the stage starts."""
    if start.checkpoint is None:
        log.say(f"{stage.name} starts fresh")
        return
    if not start.foreign and start.kind != "init":
        report = str(load_own(start.checkpoint, start.manifest, engine, objective))
    else:
        tensors = engine.tensors(objective.networks, optimizer=start.kind != "init")
        if start.foreign:
            report = load_foreign(stage, start.checkpoint, tensors)
            engine.optimizer_steps = start.step
        else:
            report = str(load_initial(stage, start.checkpoint, tensors))
        engine.restore(objective.networks, tensors)
    log.say(f"{stage.name}: {start.kind} from {start.checkpoint} at step {start.step}: {report}")
    then = start.manifest.get("attention") if start.kind == "resume" else None
    if then not in (None, engine.attention):
        log.say(f"attention was by {then}, now by {engine.attention}: results are not equal to the bit")
