"""Stateless randomness: every draw is a hash of its key.

A key is a seed, a purpose and integer coordinates, such as ``(seed, "crop", step, slot)``. Resuming
needs no saved state, and the number of ranks or loader workers cannot change a draw. The hash is our
own (the finaliser of SplitMix64, applied word by word) because library streams change between versions.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def mix64(x: U64) -> U64:
    """SplitMix64's finaliser: a bijection of 64-bit words, vectorised."""
    with np.errstate(over="ignore"):
        x = x + _GAMMA
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
        return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1024)
def _purpose_word(purpose: str) -> int:
    word = np.zeros(1, np.uint64)
    for byte in purpose.encode():
        word = mix64(word ^ np.uint64(byte))
    return int(word[0])


def key64(seed: int, purpose: str, *coordinates: int) -> int:
    """Returns the 64-bit key of one draw."""
    word = np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)
    for part in (_purpose_word(purpose), *coordinates):
        word = mix64(word ^ np.uint64(int(part) & 0xFFFFFFFFFFFFFFFF))
    return int(word[0])


def keys64(seed: int, purpose: str, *coordinates: npt.ArrayLike) -> U64:
    """``key64`` for arrays of coordinates, broadcast together: returns the keys of many draws."""
    word = np.array(key64(seed, purpose), np.uint64)
    for part in coordinates:
        word = mix64(word ^ np.asarray(part).astype(np.uint64))
    return word


def words(key: int, n: int, first: int = 0) -> U64:
    """Returns words ``first … first+n-1`` of the infinite sequence of a key."""
    counter = np.arange(first, first + n, dtype=np.uint64)
    return mix64(mix64(counter) ^ np.uint64(key))


def permuted(index: npt.ArrayLike, n: npt.ArrayLike, key: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Returns the images of indices under a keyed permutation of 0 … n-1. Closed form, no table.

    n and key are scalars, or arrays with a value for each index (n below 2^53).
    The permutation is a four-round Feistel network on the smallest even number of bits that holds n. It is
    applied repeatedly until the result is below n (cycle walking, Black & Rogaway 2002): at most four times
    as many rounds on average.
    """
    x, limit, keys = np.broadcast_arrays(*(np.array(v, dtype=np.uint64, ndmin=1) for v in (index, n, key)))
    x = x.copy()
    # frexp's exponent of n-1 is its bit length; n = 1 gets one bit and walks to 0.
    half = np.maximum(1, (np.frexp((limit - np.uint64(1)).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    low = (np.uint64(1) << half) - np.uint64(1)
    counters = mix64(np.arange(4, dtype=np.uint64))

    walking = np.arange(x.size)
    while walking.size:
        left, right = x[walking] >> half[walking], x[walking] & low[walking]
        for counter in counters:
            round_key = mix64(counter ^ keys[walking])
            left, right = right, left ^ (mix64(right ^ round_key) & low[walking])
        x[walking] = (left << half[walking]) | right
        walking = walking[x[walking] >= limit[walking]]
    return x.astype(np.int64).reshape(np.broadcast_shapes(np.shape(index), np.shape(n), np.shape(key)))


class KeyedRng:
    """The sequence of draws of one key, consumed in order inside one function.

    >>> KeyedRng(0, "crop", 17, 3).uniform() == KeyedRng(0, "crop", 17, 3).uniform()
    True
    """

    def __init__(self, seed: int, purpose: str, *coordinates: int) -> None:
        self._key = key64(seed, purpose, *coordinates)
        self._used = 0

    def words(self, n: int) -> U64:
        """Returns the next n 64-bit words."""
        out = words(self._key, n, self._used)
        self._used += n
        return out

    def uniforms(self, n: int) -> npt.NDArray[np.float64]:
        """n numbers, uniform in [0, 1), with 53 random bits each."""
        return (self.words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number, uniform in [low, high)."""
        return low + (high - low) * float(self.uniforms(1)[0])

    def integer(self, n: int) -> int:
        """One integer, uniform in 0 … n-1 (the bias of the product method is below n / 2^53)."""
        return min(int(self.uniforms(1)[0] * n), n - 1)

    def shuffled(self, n: int) -> npt.NDArray[np.int64]:
        """A permutation of 0 … n-1."""
        return np.argsort(self.words(n), kind="stable")
