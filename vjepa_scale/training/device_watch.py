"""Checks the ranks' devices at an interval, and reports ranks that compute wrong, are slow, or wait for their data.

A rank that computes wrong ends the job on all ranks. The other problems lead to a warning and to an event ``device`` in
the history, which ``status`` shows.
"""

import logging
from dataclasses import dataclass

import torch

from vjepa_scale.core.ranks import Ranks
from vjepa_scale.distributed import process_group
from vjepa_scale.recipe.guard_sections import DeviceCheckConfig
from vjepa_scale.run.events import device_in_words
from vjepa_scale.run.rank_places import node_name
from vjepa_scale.training.attempt_log import AttemptLog
from vjepa_scale.training.device_check import CheckResult, DeviceProducts
from vjepa_scale.training.stragglers import Finding, LateData, Reference, SlowDevices

# History rows about one rank's problem in one attempt. One that comes and goes is not reported for ever.
MOST_ROWS = 10

_log = logging.getLogger(__name__)


class WrongDeviceError(RuntimeError):
    """This rank's device has computed a wrong result."""


class PeerDeviceError(RuntimeError):
    """Another rank's device has computed a wrong result."""


@dataclass(frozen=True)
class RankDevice:
    """A rank's node and device. device: ``cpu``, or ``cuda:0 (NVIDIA H100 80GB HBM3, GPU-…)``, with the GPU's UUID"""

    node: str
    device: str


class DeviceWatch:
    """Every rank has one. Its checks are collective.

    dtype: the compute type of the run
    """

    def __init__(
        self, cfg: DeviceCheckConfig, *, device: torch.device, dtype: torch.dtype, ranks: Ranks, log: AttemptLog
    ) -> None:
        self._cfg, self._ranks, self._log = cfg, ranks, log
        self._devices = process_group.from_all(_rank_device(device))
        self._products = None if cfg.every is None else DeviceProducts(device, dtype)
        self._reference = Reference(self._products.expected if self._products else ())
        # Processes on CPU share cores: their times say nothing about a device.
        self._slow = SlowDevices(cfg.slow_factor if device.type == "cuda" else None, cfg.window)
        self._late = LateData()
        self._passed: int | None = None  # the step of the last check that all ranks passed
        self._rows: dict[tuple[int, str], int] = {}

    def after(self, step: int, waited_s: list[float], *, seconds: float) -> None:
        """Compares the ranks' waits in a step, and checks the devices if it is time.

        waited_s: of each rank, for its batch; seconds: that the step took
        """
        self._report(self._late.add(waited_s, seconds), step + 1)
        if self._cfg.every is not None and (step + 1) % self._cfg.every == 0:
            self.check(step + 1)

    def check(self, step: int) -> None:
        """Checks all ranks' devices, after so many steps. Collective.

        Raises WrongDeviceError on ranks whose device computes wrong, then PeerDeviceError on the others.
        """
        if self._products is None:
            return
        results: list[CheckResult] = process_group.from_all(self._products.check())
        first = self._passed is None
        wrong = self._reference.wrong([result.sums for result in results])
        if first and self._reference.inexact and self._ranks.is_main:
            sums = ", ".join(map(self._products.in_words, self._reference.inexact))
            _log.warning("no device gives the exact result of %s: they are compared with each other only", sums)
        if wrong:
            self._report([Finding(rank, "wrong") for rank in wrong], step)
            raise self._error(wrong)
        self._passed = step
        self._report(self._slow.add([result.seconds for result in results]), step)

    def _error(self, wrong: dict[int, int]) -> RuntimeError:
        assert self._products is not None
        parts = [
            f"rank {rank} on {self._devices[rank].node}, {self._devices[rank].device}: {self._products.in_words(index)}"
            for rank, index in wrong.items()
        ]
        since = "its first check" if self._passed is None else f"the check at step {self._passed}, which it passed"
        text = (
            f"wrong results: {'; '.join(parts)}; since {since}. Exclude the node, or guards.check_devices.every=null "
            "(docs/watching.md#a-bad-or-slow-gpu)"
        )
        return (WrongDeviceError if self._ranks.rank in wrong else PeerDeviceError)(text)

    def _report(self, findings: list[Finding], step: int) -> None:
        for finding in findings:
            key = (finding.rank, finding.problem)
            self._rows[key] = self._rows.get(key, 0) + 1
            if self._rows[key] > MOST_ROWS or not self._ranks.is_main:
                continue
            found = self._devices[finding.rank]
            row = {
                "rank": finding.rank,
                "node": found.node,
                "device": found.device,
                "problem": finding.problem,
                "times": _rounded(finding.times),
                "share": _rounded(finding.share),
                "over": finding.over,
                "step": step,
            }
            self._log.event("device", **row)
            (_log.info if finding.over else _log.warning)("%s", device_in_words(row))


def _rank_device(device: torch.device) -> RankDevice:
    node = node_name()
    if device.type != "cuda":
        return RankDevice(node, device.type)
    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{str(properties.uuid).removeprefix('GPU-')}" if getattr(properties, "uuid", None) else ""
    # The number is the process's own: CUDA_VISIBLE_DEVICES may hide others. The UUID is nvidia-smi's too.
    return RankDevice(node, f"{device} ({properties.name}{f', {uuid}' if uuid else ''})")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
