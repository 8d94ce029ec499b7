"""What is measured at an interval in training: whether features collapse, and what their loss is worth.

A step's loss adds sums over its features, on its device. One collective adds up the ranks, and a thread of rank 0 turns
the sums into the columns of metrics.jsonl (run/columns.py), so no step waits for a device or for eigenvalues.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from vjepa_scale.distributed import process_group
from vjepa_scale.eval.effective_rank import rank_of_covariance

# Tokens of a clip that count. Enough to detect a collapse; all 18,432 of a 64-frame clip would cost more than they add.
OBSERVED_TOKENS = 256
# Steps of Roberts' R2 sequence, which fills a square evenly.
_R2 = (0.7548776662466927, 0.5698402909980532)
# Below this share of its square, a variance is rounding of float64 sums.
_ROUNDING = 1e-12

Sums = dict[str, Tensor]
Columns = dict[str, float]


class Observation:
    """Sums over the features of one step of one rank.

    data_sets: those whose losses are measured separately; the same on every rank
    Every rank calls the same methods, equally often or not, and then ``measured``.
    """

    def __init__(self, data_sets: Sequence[str] = ()) -> None:
        self._data_sets = list(data_sets)
        self._sums: Sums = {}  # float64
        self._of_rank: dict[str, float] = {}

    def add_target(self, features_BND: Tensor, grid: tuple[int, int, int]) -> None:
        """Adds target features of whole clips. grid: time, height and width in tokens, N together"""
        T, h, w = grid
        places = _places(h, w, max(1, OBSERVED_TOKENS // T), features_BND.device)
        seen_BTPD = features_BND.detach().unflatten(1, (T, h * w)).index_select(2, places)
        self._add_rows("target", seen_BTPD.flatten(0, 2))
        seen_BTPD = seen_BTPD.double() * (T > 1)  # an image has no time; other ranks may have videos
        self._add("within", (seen_BTPD - seen_BTPD.mean((1, 2), keepdim=True)).square().sum())
        self._add("over_time", (seen_BTPD - seen_BTPD.mean(1, keepdim=True)).square().sum())

    def add_context(self, features_BKD: Tensor, target_BKD: Tensor) -> None:
        """Adds features of the context encoder, and the target's of the same tokens."""
        stride = -(-features_BKD.shape[1] // OBSERVED_TOKENS)
        ours, theirs = (each.detach()[:, ::stride].flatten(0, 1).double() for each in (features_BKD, target_BKD))
        self._add_rows("context", ours)
        self._add("product", (ours * theirs).sum())
        self._add("paired", theirs.sum(0))
        self._add("paired_square", theirs.square().sum())

    def add_losses(
        self,
        predicted_BMD: Tensor,
        wanted_BMD: Tensor,
        datasets: Sequence[str],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Adds the loss of each clip, and that of predicting the mean of all wanted tokens of these clips.

        datasets: of each clip
        """
        own = torch.zeros(2, max(1, len(self._data_sets)), dtype=torch.float64, device=predicted_BMD.device)
        mean_loss, mean_D = own.new_zeros(2), wanted_BMD.detach().mean((0, 1))
        for predicted, wanted, name in zip(predicted_BMD.detach(), wanted_BMD.detach(), datasets, strict=True):
            found = loss(predicted, wanted).double()  # clip by clip: differences of all of them would be large
            mean_loss += torch.stack([found, loss(mean_D.expand_as(wanted), wanted).double()])
            if self._data_sets:
                own[:, self._data_sets.index(name)] += torch.stack([found, torch.ones_like(found)])
        self._add("losses", mean_loss)
        self._add("of_data_sets", own)

    def add_distance(self, apart: Tensor, whole: Tensor) -> None:
        """Adds squared norms of this rank's shards: of target encoder minus encoder, and of the encoder."""
        self._add("distance", torch.stack([apart, whole]))

    def add_update(self, before: Tensor, after: Tensor, counts: Tensor) -> None:
        """Adds samples of this rank's weights before and after a step, float32 [n].

        counts: of weights that each sample stands for
        """
        change, weights = (after - before).double(), before.double()
        self._add("update", torch.stack([(change.square() * counts).sum(), (weights.square() * counts).sum()]))

    def add_of_rank(self, name: str, value: float) -> None:
        """Adds a figure of this rank; its largest value of all ranks is reported."""
        self._of_rank[name] = value

    def measured(self, device: torch.device) -> "Future[Columns] | None":
        """Computes the columns from the sums of all ranks. Collective; returns a future on rank 0, else None.

        device: for the collective
        """
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        own = torch.zeros(len(self._of_rank), ranks, dtype=torch.float64)
        own[:, rank] = torch.tensor(list(self._of_rank.values()), dtype=torch.float64)
        self._add("of_ranks", own.to(device, non_blocking=True))
        names = list(self._sums)
        shapes = [self._sums[name].shape for name in names]
        whole = torch.cat([self._sums[name].flatten() for name in names])
        if dist.is_initialized():
            dist.all_reduce(whole)
            if not process_group.is_main():
                return None

        def columns() -> Columns:
            parts = whole.cpu().split([shape.numel() for shape in shapes])  # this thread alone waits for the device
            sums = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
            return _columns(sums, self._data_sets, list(self._of_rank))

        return _thread(torch.get_num_threads()).submit(columns)

    def _add_rows(self, name: str, features: Tensor) -> None:
        """Adds what the covariance of feature rows [n, D] follows from."""
        rows = features.detach().double()
        self._add(f"{name}_outer", rows.T @ rows)
        self._add(f"{name}_sum", rows.sum(0))
        self._add(f"{name}_rows", rows.new_full((), rows.shape[0]))

    def _add(self, name: str, values: Tensor) -> None:
        values = values.double()
        self._sums[name] = self._sums[name] + values if name in self._sums else values


@cache
def _places(h: int, w: int, count: int, device: torch.device) -> Tensor:
    """Returns up to ``count`` positions of a raster, spread over rows and columns; an even stride can stay in one.

    Computed once, because a copy of indices to a GPU waits for it.
    """
    drawn = {int(i * _R2[0] % 1 * h) * w + int(i * _R2[1] % 1 * w) for i in range(1, count + 1)}
    return torch.tensor(list(range(h * w)) if count >= h * w else sorted(drawn), device=device)


def _columns(sums: Sums, data_sets: Sequence[str], of_rank: Sequence[str]) -> Columns:
    found: dict[str, float | None] = {}
    for name, column in (("target", "effective_rank"), ("context", "collapse/context_rank")):
        if f"{name}_outer" in sums:
            outer_DD, sum_D, rows = (sums[f"{name}_{part}"] for part in ("outer", "sum", "rows"))
            centred_DD = outer_DD - torch.outer(sum_D, sum_D) / rows
            varies = centred_DD.trace() > _ROUNDING * outer_DD.trace()
            found[column] = rank_of_covariance(centred_DD) if varies else 0.0
            deviation_D = centred_DD.diagonal().clamp(min=0).sqrt()
            # The root mean square of the features is 1: as after LayerNorm, whatever their scale.
            found[f"collapse/{name}_std"] = _ratio(deviation_D.mean(), (outer_DD.trace() / len(sum_D)).sqrt()) or 0.0
    if "within" in sums and sums["within"] > _ROUNDING * sums["target_outer"].trace():
        found["collapse/over_time"] = _ratio(sums["over_time"], sums["within"])
    if "product" in sums:
        rows, ours_D, theirs_D = sums["context_rows"], sums["context_sum"], sums["paired"]
        product = sums["product"] - ours_D @ theirs_D / rows
        squares = [
            (square - sum_D @ sum_D / rows).clamp(min=0)
            for square, sum_D in ((sums["context_outer"].trace(), ours_D), (sums["paired_square"], theirs_D))
        ]
        found["collapse/cosine"] = _ratio(product, (squares[0] * squares[1]).sqrt())
    if "losses" in sums:
        ours, of_mean = sums["losses"]
        found["collapse/to_mean"] = _ratio(ours, of_mean)
        if len(data_sets) > 1:
            for name, (loss, clips) in zip(data_sets, sums["of_data_sets"].T.tolist(), strict=True):
                if clips:
                    found[f"data_loss/{name}"] = loss / clips
    for name, column in (("distance", "collapse/distance"), ("update", "update_ratio")):
        if name in sums:
            change, whole = sums[name]
            found[column] = _ratio(change.sqrt(), whole.sqrt())
    known = {column: value for column, value in found.items() if value is not None}
    return known | dict(zip(of_rank, sums["of_ranks"].amax(1).tolist(), strict=True))


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    """part / whole; None where there is nothing to compare with."""
    return float(part / whole) if whole else None


class _Thread:
    """A thread that computes one result after another. A daemon: waiting for a device must not hold a rank's end.

    threads: of PyTorch, a per-thread setting that affects bits
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._tasks: SimpleQueue[tuple[Future[Columns], Callable[[], Columns]]] = SimpleQueue()
        Thread(target=self._run, name="observation", daemon=True).start()

    def submit(self, compute: Callable[[], Columns]) -> "Future[Columns]":
        future: Future[Columns] = Future()
        self._tasks.put((future, compute))
        return future

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            future, compute = self._tasks.get()
            try:
                future.set_result(compute())
            except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
                future.set_exception(error)


_thread = cache(_Thread)
