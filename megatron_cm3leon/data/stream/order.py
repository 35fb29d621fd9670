"""Global order and random draws of the stream: pure functions, without any generator state.

Every draw is a hash of (seed, purpose, source, epoch) and of counters such as a position or a document number, so any
batch of any run can be drawn again by itself. `permute` is a keyed bijection of 0..count-1 (a Feistel network with
cycle walking back into the range): it gives the order of an epoch without a table.
"""

import hashlib
import math

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 6


def derive_key(seed: int, purpose: str, *parts: int | str) -> int:
    """64-bit key of one purpose, such as ("order", source, epoch), under a seed."""
    text = repr((int(seed), purpose, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(bits: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the argument."""
    mixed = bits >> np.uint64(30)  # in place from here on, which halves the time for long arrays
    mixed ^= bits
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return mixed


def draw_bits(key: int, *counters) -> np.ndarray:
    """64 random bits for each element of the broadcast counters (at least one-dimensional)."""
    bits = np.array([key], np.uint64)  # an array, not a scalar: numpy warns when scalars wrap around
    for counter in counters:
        bits = _mix(bits + (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return bits


def draw_uniform(key: int, *counters) -> np.ndarray:
    """Uniform doubles in [0, 1), one for each element of the broadcast counters."""
    return (draw_bits(key, *counters) >> np.uint64(11)) * 2.0**-53


def draw_integers(key: int, count, *counters) -> np.ndarray:
    """Integers 0..count-1, equally likely up to 2**-53; `count` broadcasts with the counters."""
    return (draw_uniform(key, *counters) * count).astype(np.int64)


def permute(positions, count: int, key: int) -> np.ndarray:
    """Images of `positions` under a keyed permutation of 0..count-1; int64, O(1) per position."""
    width = max(1, (count - 1).bit_length())
    low_bits = np.uint64(width - width // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(width // 2)) - np.uint64(1)
    keys = draw_bits(key, np.arange(_FEISTEL_ROUNDS))

    def encipher(values: np.ndarray) -> np.ndarray:
        low, high = values & low_mask, values >> low_bits
        for number in range(0, _FEISTEL_ROUNDS, 2):
            low = low ^ (_mix(high + keys[number]) & low_mask)
            high = high ^ (_mix(low + keys[number + 1]) & high_mask)
        return (high << low_bits) | low

    values = encipher(np.atleast_1d(np.asarray(positions)).astype(np.uint64))
    outside = np.flatnonzero(values >= count)
    while outside.size:  # the domain is less than twice the count: two steps are expected at most
        values[outside] = encipher(values[outside])
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def poisson_table(mean: float) -> np.ndarray:
    """Cumulative Poisson probabilities; `np.searchsorted(table, uniform, "right")` is a draw."""
    if mean <= 0:
        return np.ones(1)
    counts = np.arange(int(mean + 12 * math.sqrt(mean) + 24))
    logs = counts * math.log(mean) - mean - np.array([math.lgamma(count + 1) for count in counts.tolist()])
    return np.cumsum(np.exp(logs))
