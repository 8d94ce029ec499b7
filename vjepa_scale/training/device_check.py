"""Checks a device by small matrix products and sums whose exact results are known, and times it.

Every order of summation gives the same bits, since the numbers are integers. Columns of the left matrix come in equal
pairs x; the right matrix has the rows y and e − y for them, where e has zeros and ones. So the result is Σ x·e,
which is x with its columns in another order, but every x·y is computed and cancels. |x·y| < 2¹⁴ and partial sums stay
below 2²⁴: with bfloat16 inputs and float32 accumulation all is exact, and a result of at most 127 needs no rounding.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

# (m, k, n) of the products of an m×k and a k×n matrix; the first one is timed. k in whole blocks of pairs.
SHAPES = {
    "cuda": ((2048, 2048, 2048), (768, 1024, 1000), (96, 4096, 512)),
    "cpu": ((128, 256, 128), (40, 512, 96), (33, 64, 17)),
}
_BLOCK = 32  # a pair lies in one block, so that a sum over k in parts of whole blocks is exact too
# Products per timed burst, and bursts, of which the fastest counts: other work on the device only adds time.
_IN_A_BURST = {torch.bfloat16: 40, torch.float32: 8}
_BURSTS = 5


@dataclass(frozen=True)
class CheckResult:
    """A rank's results of one check.

    sums:    a checksum of each product, then the sum of the first one's elements
    seconds: of the fastest burst of products; on CPU of a single product
    """

    sums: tuple[int, ...]
    seconds: float


class DeviceProducts:
    """The inputs and the expected checksums of a check, made once, on the CPU. A check frees the device's memory again.

    dtype: of the products: the compute type of the run
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.shapes = SHAPES["cuda" if device.type == "cuda" else "cpu"]
        made = [_product(shape, key, dtype) for key, shape in enumerate(self.shapes)]
        self._inputs = [(a, b) for a, b, _ in made]
        results = [result for *_, result in made]
        self.expected = (*map(_checksum, results), _sum(results[0]))

    @torch.no_grad()
    def check(self) -> CheckResult:
        """Computes and times the products on the device. Synchronises it."""
        sums: list[int] = []
        seconds = total = 0.0
        for index, (a, b) in enumerate(self._inputs):
            left, right = a.to(self._device), b.to(self._device)
            result = multiply(left, right)
            sums.append(_checksum(result))
            if index == 0:
                total, seconds = _sum(result), self._timed(left, right, result)
        return CheckResult((*sums, int(total)), seconds)

    def _timed(self, left: Tensor, right: Tensor, out: Tensor) -> float:
        if self._device.type != "cuda":
            began = time.perf_counter()
            torch.mm(left, right, out=out)
            return time.perf_counter() - began
        fastest = float("inf")
        for _ in range(_BURSTS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_IN_A_BURST[self._dtype]):
                torch.mm(left, right, out=out)
            end.record()
            end.synchronize()
            fastest = min(fastest, start.elapsed_time(end) / 1000)
        return fastest

    def in_words(self, index: int) -> str:
        """Returns what one of the sums is of."""
        if index == len(self.shapes):
            return "a sum"
        m, k, n = self.shapes[index]
        return f"a product of {m}×{k} and {k}×{n} numbers"


def multiply(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def _product(shape: tuple[int, int, int], key: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the left [m, k] and the right matrix [k, n], and their exact product [m, n]."""
    m, k, n = shape
    assert k % _BLOCK == 0, "pairs lie in whole blocks"
    pairs, half = torch.arange(k // 2), _BLOCK // 2
    block, place = pairs // half * _BLOCK, pairs % half
    first, second = block + place, block + _BLOCK - 1 - place
    x, y = _integers((m, k // 2), 2 * key, most=127), _integers((k // 2, n), 2 * key + 1, most=126)
    chosen = (torch.arange(n) * 7919 + key) % (k // 2)  # the column of x that each column of the result is
    unit = torch.zeros_like(y)
    unit[chosen, torch.arange(n)] = 1
    left, right = torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype)
    left[:, first] = left[:, second] = x.to(dtype)
    right[first], right[second] = y.to(dtype), (unit - y).to(dtype)
    return left, right, x[:, chosen].to(dtype)


def _integers(shape: tuple[int, int], key: int, *, most: int) -> Tensor:
    """Returns integers from −most to most, mixed from their places (Knuth's multiplicative hash, then a shift)."""
    mixed = (torch.arange(shape[0] * shape[1]) + (key << 24)) * 2654435761 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 2246822519 & 0xFFFFFFFF
    return ((mixed >> 9) % (2 * most + 1) - most).view(shape).to(torch.int32)


def _checksum(result: Tensor) -> int:
    """Returns the sum of a matrix's bits with odd weights, modulo 2⁶⁴: exact in any order, and any error shows."""
    result = result + 0.0  # −0 becomes 0
    bits = result.view(torch.int32 if result.dtype == torch.float32 else torch.int16).long()
    weights = [2 * torch.arange(size, device=result.device) * 1000003 + 1 for size in result.shape]
    return int(((bits * weights[1]).sum(1) * weights[0]).sum())


def _sum(result: Tensor) -> int:
    return int(result.float().sum())
