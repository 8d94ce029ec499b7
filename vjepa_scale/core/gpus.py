"""GPUs' memory and dense bf16 peaks, from NVIDIA's data sheets: tensor cores, float32 accumulation, no sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory: bytes; peak: FLOP/s"""

    memory: float
    peak: float


# The values of ``launch.gpu``. Memory in decimal GB, as labelled.
GPUS = {
    "A100": Gpu(80e9, 312e12),  # SXM, 80 GB
    "H100": Gpu(80e9, 989e12),  # SXM
    "H200": Gpu(141e9, 989e12),  # SXM
    "RTX4090": Gpu(24e9, 165e12),
}
# By a part of the name that the driver reports; the first that fits. Cards of one chip differ in clock and power.
_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_of(name: str) -> float | None:
    """Returns the bf16 peak in FLOP/s of a device with this name (``NVIDIA H100 80GB HBM3``); None if unknown."""
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
