"""Claims, and whether the results support them.

"A beats B" over n seeds: the difference of A and B, paired by item, has the same sign in every seed, and the 95 %
bootstrap interval over at least 1,000 held-out items excludes 0. The interval is of the mean over the seeds; that of a
Fréchet distance is 1.96 standard deviations of the difference of resampled sets (evaluation/metrics/distances.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from claims.plan import Plan
from claims.results import Results, unpack_values
from claims.statements import Claim

from megatron_cm3leon.evaluation.result import bootstrap

FEWEST_ITEMS = 1000
HIGHER = {"right", "score", "text_right", "box_right"}
"""Measures of which the larger value is better; of all others the smaller one."""
PERCENT = {"right", "text_right", "box_right"}
"""Measures in percent."""
LABELS = {
    "loss": "loss, nats per token",
    "loss_text": "loss of text, nats per token",
    "loss_image": "loss of images, nats per code",
    "fd": "Fréchet distance x 1000",
    "score": "CLIP score",
    "right": "right, %",
    "text_right": "words right, %",
    "box_right": "codes of the box right, %",
    "box_nats": "loss of the box, nats per code",
    "text_nats": "loss of the word, nats",
}
FACTORS = {"fd": 1000.0}
"""Factor of the printed value."""


@dataclass(frozen=True)
class Verdict:
    """What the results say about a claim, for one family."""

    claim: Claim
    family: str
    values: tuple[float, float] | None = None
    """Means over the seeds of both arms."""
    differences: list[float] = field(default_factory=list)
    """better - worse in each seed."""
    interval: tuple[float, float] | None = None
    """Of the mean of the differences."""
    items: int = 0
    result: str = "not yet measured"

    @property
    def sign(self) -> int:
        return 1 if self.claim.measure in HIGHER else -1


def judge_claim(claim: Claim, family: str, results: Results, plan: Plan) -> Verdict:
    """Compare both arms in all seeds; "not yet measured" while a seed or items are missing."""
    sizes = [plan.main_size] * 2 if claim.sizes is None else [plan.sizes[place] for place in claim.sizes]
    pairs = []
    for seed in plan.seeds:
        found = [
            results.lines.get((*arm, family, size, seed)) or results.lines.get((*arm, "none", "none", 0))
            for arm, size in zip((claim.better, claim.worse), sizes, strict=True)
        ]
        if all(found):
            pairs.append(found)
    if not pairs:
        return Verdict(claim, family)
    factor = FACTORS.get(claim.measure, 1.0)
    values = factor * np.array([[line["figures"][claim.measure][0] for line in pair] for pair in pairs])
    differences = values[:, 0] - values[:, 1]
    low, high, items = _bound_difference(pairs, claim.measure)
    sign = 1 if claim.measure in HIGHER else -1
    result = decide(sign * differences, sorted((sign * low, sign * high)), items, len(plan.seeds))
    means = values.mean(axis=0)
    return Verdict(claim, family, (means[0], means[1]), differences.tolist(), (low, high), items, result)


def _bound_difference(pairs: list[list[dict]], measure: str) -> tuple[float, float, int]:
    """Interval of the mean difference over the seeds, and the number of items."""
    factor = FACTORS.get(measure, 100.0 if measure in PERCENT else 1.0)
    if measure == "fd":
        sets = factor * np.array([[line["fd_resamples"] for line in pair] for pair in pairs])
        spread = 1.96 * float((sets[:, 0] - sets[:, 1]).mean(axis=0).std(ddof=1))
        value = factor * float(np.mean([pair[0]["figures"]["fd"][0] - pair[1]["figures"]["fd"][0] for pair in pairs]))
        return value - spread, value + spread, pairs[0][0]["values"]["right"]["n"]
    items = np.array([[unpack_values(line["values"][measure]) for line in pair] for pair in pairs])
    figure = bootstrap(factor * (items[:, 0] - items[:, 1]).mean(axis=0))
    assert figure.low is not None and figure.high is not None
    return figure.low, figure.high, items.shape[-1]


def decide(advantages: np.ndarray, interval: Sequence[float], items: int, seeds: int) -> str:
    """The rule: advantages [measured seeds] of the better arm, above 0 where it is better, and their interval."""
    if len(advantages) < seeds:
        return f"not yet measured ({len(advantages)} of {seeds} seeds)"
    if items < FEWEST_ITEMS:
        return f"not yet measured ({items} of {FEWEST_ITEMS} items)"
    if (advantages > 0).all() and interval[0] > 0:
        return "holds"
    if (advantages < 0).all() and interval[1] < 0:
        return "fails: the opposite holds"
    return "fails"
