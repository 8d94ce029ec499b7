"""The columns of metrics.jsonl: name, unit, meaning, what is normal. Does not import PyTorch.

docs/watching.md has this table (``python -m vjepa_scale.run.columns`` prints it). Reports and sinks use the names.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from vjepa_scale.recipe.guard_sections import LIMITS, SETTLES_STEPS, Limit


@dataclass(frozen=True)
class Column:
    """One column, or a family of columns whose name ends in ``*``.

    unit:   "" for a pure number
    meaning, normal: Markdown
    at_interval: measured every ``log.effective_rank_every`` steps; other rows do not have it
    of_machine:  depends on the machine and its load, so two equal runs differ in it
    """

    name: str
    unit: str
    meaning: str
    normal: str = ""
    at_interval: bool = False
    of_machine: bool = False

    @property
    def limit(self) -> Limit | None:
        """The limit that tells of a collapse."""
        return LIMITS.get(self.name)


COLUMNS = (
    Column("step", "optimiser steps, over all stages", "the step of the row", "rises by 1"),
    Column("phase", "name", "the phase of the stage"),
    Column(
        "loss",
        "",
        "mean L1 distance to the target's features (of `action`: the sum of its two parts; of `probe`: cross-entropy "
        "summed over the probes)",
        "falls at first. Of `jepa` it may rise again while features improve, since the target changes; a loss near 0 "
        "is a collapse",
    ),
    Column("mask_loss/*", "", "`loss` of one mask generator, by its number in `masks.generators`", "as `loss`"),
    Column(
        "data_loss/*",
        "",
        "`loss` of the clips of one data set, in steps that have some; with two or more data sets",
        "sets differ; a set whose loss alone rises has changed or is damaged", at_interval=True
    ),
    Column("lr", "", "learning rate", "follows the schedule (`--dry-run`)"),
    Column("weight_decay", "", "weight decay, where it is scheduled", "follows the schedule"),
    Column("ema", "", "momentum of the target encoder", "follows the schedule"),
    Column(
        "grad_norm",
        "",
        "L2 norm of all gradients, before clipping",
        "finite. A norm that grows by factors over hundreds of steps comes before a divergence: lower `start_lr`, or "
        "set `optimizer.clip_grad_norm`",
    ),
    Column(
        "update_ratio",
        "",
        "L2 norm of a step's change of the weights divided by the weights' norm, on up to 4,096 values of each shard "
        "of a weight",
        "proportional to `lr`, and steady where that is. Suddenly ten times as much: a spike",
        at_interval=True,
    ),
    Column(
        "effective_rank",
        "dimensions",
        "directions that the target's features use, 1 to the encoder's width",
        "far above 1, and not falling for long",
        at_interval=True,
    ),
    Column(
        "collapse/context_rank", "dimensions", "`effective_rank` of the context encoder's features",
        "as `effective_rank`", at_interval=True,
    ),
    Column(
        "collapse/target_std", "", "standard deviation over tokens of the target's layer-normalised features, mean "
        "over dimensions", "0.5 to 1; 0: all tokens are equal", at_interval=True,
    ),
    Column(
        "collapse/context_std", "", "the same of the context encoder's features", "as `collapse/target_std`",
        at_interval=True,
    ),
    Column(
        "collapse/cosine", "", "cosine between the context encoder's and the target's features of the same tokens, "
        "each without its mean", "above 0, below 1: the context encoder sees less", at_interval=True,
    ),
    Column(
        "collapse/distance", "", "L2 distance of the target encoder's weights from the encoder's, divided by their "
        "norm, before the step", "above 0 from the second step on; 0: the target is not an average",
        at_interval=True,
    ),
    Column(
        "collapse/over_time", "", "share of the variance of a clip's target features that is over time, at fixed "
        "positions", "0.1 to 0.7 for clips in which something moves", at_interval=True,
    ),
    Column(
        "collapse/to_mean", "", "`loss` divided by that of predicting the mean of a micro-batch's target tokens",
        "falls below 1; at 1 the predictor has learned nothing, or the tokens are equal", at_interval=True,
    ),
    Column(
        "collapse/to_copy", "", "of `action`: `teacher_loss` divided by `copy_loss`",
        "falls below 1; at 1 the predictor does no better than repeating the last frame",
    ),
    Column(
        "clips_per_s", "clips of all ranks per second", "throughput", "steady in a phase. Lower after a restart: the "
        "loader starts. If it varies, the loader is the limit: more `data.workers`", of_machine=True,
    ),
    Column(
        "tokens_per_s", "tokens per second", "tokens of whole clips, of all ranks", "as `clips_per_s`", of_machine=True
    ),
    Column(
        "flops_per_s", "FLOP/s", "model FLOPs of all ranks, forward and backward, without recomputation",
        "steady in a phase", of_machine=True,
    ),
    Column(
        "mfu", "", "`flops_per_s` divided by the peak of all devices", "0.2 to 0.45 on a GPU", of_machine=True
    ),
    Column(
        "waiting", "share of the step", "time that the slowest rank waited for data", "below 0.05. Above: more "
        "`data.workers`, smaller videos (`--transcode`), or faster storage", of_machine=True,
    ),
    Column(
        "saving", "share of the time since the last row", "time that training waited for a checkpoint",
        "near 0 in most rows", of_machine=True,
    ),
    Column(
        "memory/*", "GB", "of the rank with the most: `allocated`, `reserved`, `peak` of the device (on a GPU); "
        "`process`, `loader`: resident memory of the rank and of its loader workers", "steady in a phase",
        at_interval=True,
        of_machine=True,
    ),
    Column(
        "decode/seconds", "s per clip", "time of a loader worker for reading, decoding and cropping one clip",
        "steady; much above other nodes: slow storage", of_machine=True,
    ),
    Column(
        "decode/cores", "cores per rank", "that time per second: cores that the loader keeps busy",
        "below the cores that a rank has", of_machine=True,
    ),
    Column("skipped", "", "1 in the row of a step that changed nothing, since it was a spike: `loss` and `grad_norm` "
           "are what was seen, null if not finite", "absent. [Spikes](watching.md#spikes)"),
    Column("substituted", "clips", "clips of this step that were replaced since they do not decode",
           "0. [loader.md](loader.md)"),
    Column("substituted/*", "clips", "the same by cause, in rows that have some"),
    Column("restarts", "", "earlier starts of the stage", "0", of_machine=True),
    Column(
        "teacher_loss", "", "of `action`: [action.md](action.md#loss)", "falls below `copy_loss`"
    ),
    Column("rollout_loss", "", "of `action`", ""),
    Column("copy_loss", "", "of `action`: the loss of repeating the last frame", ""),
    Column("best_loss", "", "of `probe`: [probe.md](probe.md)", ""),
    Column("accuracy", "", "of `probe`", ""),
)  # fmt: skip


def column_of(name: str) -> Column | None:
    """Returns the column with this name, or whose family it belongs to."""
    return next((column for column in COLUMNS if fnmatchcase(name, column.name)), None)


def table() -> str:
    """Returns docs/watching.md's table."""
    rows = ["| column | unit | meaning | what is normal | limit |", "|---|---|---|---|---|"]
    return "\n".join([*rows, *(f"| {' | '.join(_cells(column))} |" for column in COLUMNS)])


def _cells(column: Column) -> tuple[str, ...]:
    limit = column.limit
    after = f", after {limit.settles:.0%} of the steps and {SETTLES_STEPS}" if limit and limit.settles else ""
    words = f"{'above' if limit.above else 'below'} {limit.value:g}{after}" if limit else ""
    return f"`{column.name}`", column.unit, column.meaning, column.normal, words


if __name__ == "__main__":
    print(table())
