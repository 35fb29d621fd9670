"""Stragglers: the rank whose own work takes longest, against the median of ranks.

Data-parallel ranks wait for the slowest at each step: their steps take the same time, so what is compared is the time
before a rank waits for others (its loader, and Engine.compute_seconds, which states what each engine measures). Ranks
of one replica (tensor, context and pipeline parallel) wait for each other within their passes and look alike: the one
that is named then stands for its replica. Under zero=3 passes wait for weights: only a slow loader is told.
"""

import logging
import platform
import statistics
from collections.abc import Callable

logger = logging.getLogger(__name__)

WARN_ABOVE = 1.25
"""Times the median from which on the slowest rank is worth a warning."""


class StragglerWatch:
    """Adds up each rank's own time and compares the ranks every `interval` steps."""

    def __init__(self, interval: int, gather: Callable[[object], list], first: bool) -> None:
        """`gather` gives every rank what each put in; `first`: this rank warns. An interval of 0 never compares."""
        self.interval, self.gather, self.first = interval, gather, first
        self._begun = False
        self._reset()

    def _reset(self) -> None:
        self.steps, self.data, self.passes = 0, 0.0, 0.0

    def add(self, data_seconds: float, compute_seconds: float) -> dict[str, int | str | float]:
        """Count a step; after each interval, collectively, the report for the metrics, else {}.

        The first step is not counted: its time is that of what is done once.
        """
        if not self.interval:
            return {}
        if not self._begun:
            self._begun = True
            return {}
        self.steps, self.data, self.passes = self.steps + 1, self.data + data_seconds, self.passes + compute_seconds
        if self.steps < self.interval:
            return {}
        gathered = self.gather((platform.node(), self.data / self.steps, self.passes / self.steps))
        self._reset()
        return self._report(gathered)

    def _report(self, gathered: list[tuple[str, float, float]]) -> dict[str, int | str | float]:
        """From (host, seconds in data, seconds in passes) of every rank."""
        if len(gathered) == 1:
            return {}
        own = [data + passes for _, data, passes in gathered]
        slowest = max(range(len(own)), key=own.__getitem__)
        host, data, _ = gathered[slowest]
        ratio = own[slowest] / max(statistics.median(own), 1e-9)
        if self.first and ratio > WARN_ABOVE:
            logger.warning(
                "rank %d on %s is slow: its own work takes %.3g s a step (%.3g s waiting for data), %.2f times the "
                "median of ranks, and all of them wait for it; look at that machine.",
                *(slowest, host, own[slowest], data, ratio),
            )
        return {"slowest_rank": slowest, "slowest_host": host, "slowest_over_median": ratio}
