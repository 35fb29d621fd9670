"""Stragglers: the rank whose compute time per step is longest, compared with the median of the ranks.

Data-parallel ranks wait for the slowest one in every step, so their steps take equally long. What is compared is
therefore the time before a rank waits for others: the time its loader takes, and the compute time that the engine
measures (Engine.compute_seconds says what each engine can measure). Ranks of one replica (tensor, context and pipeline
parallel) wait for each other within their passes and cannot be told apart: the rank that is reported represents its
replica. Under parallel.zero=3 the passes wait for weights, so only a slow loader is found.
"""

import logging
import platform
import statistics
from collections.abc import Callable

logger = logging.getLogger(__name__)

WARN_ABOVE = 1.25
"""Warn when the slowest rank takes more than this many times the median."""


class StragglerWatch:
    """Sums the time of each rank and compares the ranks every `interval` steps."""

    def __init__(self, interval: int, gather: Callable[[object], list[tuple[str, float, float]]], first: bool) -> None:
        """`gather`: all-gather of Python objects; `first`: whether this rank logs warnings; `interval` 0 disables."""
        self.interval, self.gather, self.first = interval, gather, first
        self._begun = False
        self.steps, self.data, self.compute = 0, 0.0, 0.0

    def add(self, data_seconds: float, compute_seconds: float) -> dict[str, int | str | float]:
        """Add a step; returns the report for the metrics after each interval (then collective), else {}.

        The first step is not counted: it includes one-time work, such as allocations and compilation.
        """
        if not self.interval:
            return {}
        if not self._begun:
            self._begun = True
            return {}
        self.steps, self.data, self.compute = self.steps + 1, self.data + data_seconds, self.compute + compute_seconds
        if self.steps < self.interval:
            return {}
        gathered = self.gather((platform.node(), self.data / self.steps, self.compute / self.steps))
        self.steps, self.data, self.compute = 0, 0.0, 0.0
        return self._report(gathered)

    def _report(self, gathered: list[tuple[str, float, float]]) -> dict[str, int | str | float]:
        """The report from (host, seconds per step in data, seconds per step in compute) of every rank."""
        if len(gathered) == 1:
            return {}
        seconds = [data + compute for _, data, compute in gathered]
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        host, data, _ = gathered[slowest]
        ratio = seconds[slowest] / max(statistics.median(seconds), 1e-9)
        if self.first and ratio > WARN_ABOVE:
            logger.warning(
                "rank %d on %s is slow: its own work takes %.3g s per step (%.3g s of it waiting for data), %.2f times "
                "the median of the ranks, and all ranks wait for it; check that machine.",
                *(slowest, host, seconds[slowest], data, ratio),
            )
        return {"slowest_rank": slowest, "slowest_host": host, "slowest_over_median": ratio}
