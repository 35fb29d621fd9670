"""Mixture: the source of each sample of the stream, with exact shares at every step.

The weights are integers w_1 .. w_S (0.7, 0.2, 0.1 become 7, 2, 1). The sources alternate in a cycle of w_1 + .. + w_S
samples: after any number of samples, the count of each source differs from its share by less than one sample
(Tijdeman's chairman assignment: of the sources that are allowed to be next, the one with the earliest deadline).

`plan_mixture` determines the weights from numbers of documents, as CM3Leon's released code does, with the paper's "3
and 0.3" read as limits of the ratio (samples per mixture epoch) / documents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MAX_CYCLE = 1 << 16


def compute_integer_weights(weights: list[float]) -> list[int]:
    """The smallest integers in the ratio of the weights, read as decimals; ValueError if they are too large."""
    parts = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(part.denominator for part in parts))
    integers = [int(part * unit) for part in parts]
    divisor = math.gcd(*integers)
    integers = [number // divisor for number in integers]
    if sum(integers) > MAX_CYCLE:
        raise ValueError(
            f"the weights of data.sources ({', '.join(f'{weight:g}' for weight in weights)}) repeat only after "
            f"{sum(integers)} samples; at most {MAX_CYCLE} are supported: write them with fewer digits."
        )
    return integers


def build_cycle(weights: list[int]) -> np.ndarray:
    """Source of each sample of one cycle, int64 [sum(weights)]."""
    sources, total = len(weights), sum(weights)
    if sources == 1:
        return np.zeros(total, np.int64)
    # In units of 1 / (total * slack): a source may be next if its share exceeds its count by 1 / slack or more.
    slack = 2 * sources - 2
    counts, cycle = [0] * sources, np.empty(total, np.int64)
    multiple = math.lcm(*weights)
    per_weight = [multiple // weight for weight in weights]  # deadlines are compared as integers over this multiple
    for step in range(1, total + 1):
        ahead = [(weight * step - count * total) * slack for weight, count in zip(weights, counts, strict=True)]
        allowed = [source for source in range(sources) if ahead[source] >= total]
        limit = (slack - 1) * total
        chosen = min(allowed, key=lambda source: (limit - ahead[source]) * per_weight[source])
        counts[chosen] += 1
        cycle[step - 1] = chosen
    assert counts == weights, f"{counts} samples per cycle instead of {weights}"
    return cycle


@dataclass(frozen=True)
class MixturePlan:
    """Shares of the sources of a mixture; every list has one entry per source."""

    documents: list[int]
    shares: list[float]
    """Share of the samples."""
    ratios: list[float]
    """Samples per mixture epoch / documents, before the limits."""
    limited: list[float]
    """The same after the limits, and after the weights are rounded to integers."""
    samples: list[float]
    """Samples of a mixture epoch."""
    weights: list[int]
    """Weights of `Mixture`; at most MAX_CYCLE in total."""
    error: float
    """Bound of the difference of a share from the exact one. 0: the shares are exact, or the samples of an epoch are
    rounded to integers; sources / MAX_CYCLE: an epoch has more samples than that, and the weights are rounded."""


def plan_mixture(
    documents: Sequence[int], shares: Sequence[float], alpha: float, cap: int, lowest: float, highest: float
) -> MixturePlan:
    """Shares in proportion to min(documents, cap)^alpha (cap 0: none), but `shares` where they are above 0.

    ratio = share x all documents / documents of the source, limited to [lowest, highest]; ratio x documents are the
    samples of a mixture epoch, and the new shares are in their proportion. Raises ValueError if a share is too small.
    """
    total = sum(documents)
    sizes = [
        0.0 if share else float(min(count, cap or count)) ** alpha
        for count, share in zip(documents, shares, strict=True)
    ]
    rest = 1 - sum(shares)
    wanted = [share or rest * size / sum(sizes) for share, size in zip(shares, sizes, strict=True)]
    # 12 digits: the last bits of a power depend on the library that computes it, and the weights must not.
    ratios = [float(f"{share * total / count:.12g}") for share, count in zip(wanted, documents, strict=True)]
    limited = [min(max(ratio, lowest), highest) for ratio in ratios]
    exact = [Fraction(str(ratio)) * count for ratio, count in zip(limited, documents, strict=True)]
    # Weights are rounded such that they stay within the limits: up at the lowest ratio, down at the highest.
    order = [0 if ratio <= lowest else 2 if ratio >= highest else 1 for ratio in ratios]
    weights, epoch, error = _round_weights(exact, order)
    for source, weight in enumerate(weights):
        if not weight:
            raise ValueError(
                f"data.sources[{source}] has {documents[source]} of {total} documents, and its share of the samples "
                f"({float(exact[source] / sum(exact)):.2g}) is below the smallest one, 1/{MAX_CYCLE}; put its "
                f"documents into another source, lower data.mixture.alpha, or set data.mixture.cap."
            )
    divisor, cycle = math.gcd(*weights), sum(weights)
    samples = [epoch * weight / cycle for weight in weights]
    return MixturePlan(
        documents=list(documents),
        shares=[weight / cycle for weight in weights],
        ratios=ratios,
        limited=[count / number for count, number in zip(samples, documents, strict=True)],
        samples=samples,
        weights=[weight // divisor for weight in weights],
        error=error,
    )


def _round_weights(exact: list[Fraction], order: list[int]) -> tuple[list[int], float, float]:
    """Weights in proportion to the samples of an epoch, the samples of an epoch, and the error of MixturePlan.

    Where the exact weights are too large, the samples are rounded: up for order 0, to the nearest for 1, down for 2,
    but to at least 1. Where those are too large, the weights are rounded.
    """
    unit = math.lcm(*(number.denominator for number in exact))
    weights = [int(number * unit) for number in exact]
    if sum(weights) // math.gcd(*weights) <= MAX_CYCLE:
        return weights, float(sum(exact)), 0.0
    rounding = (math.ceil, round, math.floor)
    weights = [max(1, rounding[kind](number)) for number, kind in zip(exact, order, strict=True)]
    if sum(weights) <= MAX_CYCLE:
        return weights, float(sum(weights)), 0.0
    return _apportion(exact, order), float(sum(exact)), len(exact) / MAX_CYCLE


def _apportion(exact: list[Fraction], order: list[int]) -> list[int]:
    """MAX_CYCLE units in proportion to `exact`, rounded down; the units left over go to the lowest order first.

    Of equal order, to those with the largest remainders. Order 2 gets none, unless there is no other.
    """
    parts = [number * MAX_CYCLE / sum(exact) for number in exact]
    weights = [math.floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda source: (order[source], weights[source] - parts[source]))
    chosen = [source for source in by_remainder if order[source] < 2] or by_remainder
    for unit in range(MAX_CYCLE - sum(weights)):
        weights[chosen[unit % len(chosen)]] += 1
    return weights


class Mixture:
    """Source of any sample, and the number of samples of that source before it."""

    def __init__(self, weights: list[float]) -> None:
        self.weights = compute_integer_weights(weights)
        self.cycle = build_cycle(self.weights)
        self.length = len(self.cycle)
        marks = self.cycle[:, None] == np.arange(len(self.weights))
        self.before = (np.cumsum(marks, 0) - marks)[np.arange(self.length), self.cycle]

    def split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of samples `numbers` (int64), and the number of each within its source; both int64."""
        cycles, positions = np.divmod(numbers, self.length)
        sources = self.cycle[positions]
        return sources, cycles * np.array(self.weights)[sources] + self.before[positions]
