"""Prefix: in which group of samples a unit of the stream stands (a token, or a block), at any distance.

Samples are taken in groups of GROUP; how many units a group has is known only by measuring it. Groups restart at each
span (an epoch). Three ways lead to a unit, tried in this order:

    an anchor   a place found before, or the cursor of a checkpoint: groups are measured from there on
    a table     the units before each group of a span, one number a group: built when a unit is far from every
                anchor, kept in memory and, where a folder is given, on disk under the stream's hash
    arithmetic  where every span has the same units, whole spans are skipped by division

Reading forward needs no table, and resuming measures at most the groups of a few batches.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

GROUP = 4096
"""Samples of a group."""
_WALK = 64
"""Groups measured from an anchor before a table is built instead."""
_ANCHORS_KEPT, _TABLES_KEPT = 1024, 4
_THREADS, _TOGETHER = 8, 4


@dataclass(frozen=True, order=True)
class Anchor:
    """Unit at which a group begins."""

    start: int
    span: int
    group: int

    def to_dict(self) -> dict:
        """The cursor that checkpoints hold."""
        return {"start": self.start, "span": self.span, "group": self.group}

    @classmethod
    def from_dict(cls, cursor: dict) -> "Anchor":
        return cls(cursor["start"], cursor["span"], cursor["group"])


class Prefix:
    """Units of the groups of a stream whose spans have `span` samples each."""

    def __init__(
        self,
        span: int,
        measure: Callable[[list[int]], list[int]],
        span_units: int | None = None,
        together: int = _TOGETHER,
    ) -> None:
        """`measure([first, .., last])` counts the units of consecutive groups, given their first samples.

        `span_units`: units of every span, where they are all the same; `together`: groups measured in one call.
        """
        self.span, self.measure, self.span_units, self.together = span, measure, span_units, together
        self.groups = -(-span // GROUP)
        self.folder: Path | None = None
        self.name = ""
        self._anchors = [Anchor(0, 0, 0)]
        self._tables: OrderedDict[int, np.ndarray] = OrderedDict()

    def keep_tables(self, folder: Path, name: str) -> None:
        """Keep tables in `folder` under `name`, which has to name all that determines them."""
        self.folder, self.name = folder, name

    def samples(self, span: int, group: int) -> tuple[int, int]:
        """First sample of a group and the one behind its last."""
        first = span * self.span + group * GROUP
        return first, min(first + GROUP, (span + 1) * self.span)

    def find(self, unit: int) -> Anchor:
        """The group that holds a unit."""
        while True:
            anchor = self._nearest(unit)
            table = self._tables.get(anchor.span)
            table = self._load(anchor.span) if table is None else table
            if table is None:
                found = self._walk(anchor, unit)
                if found:
                    return found
                table = self._build(anchor.span)
            start = anchor.start - int(table[anchor.group])
            if unit < start + table[-1]:
                group = int(np.searchsorted(table, unit - start, "right")) - 1
                return Anchor(start + int(table[group]), anchor.span, group)
            self._add(Anchor(start + int(table[-1]), anchor.span + 1, 0))

    def add_cursor(self, cursor: dict) -> None:
        """Begin at a checkpoint's cursor as if it had been found before."""
        self._add(Anchor.from_dict(cursor))

    def _nearest(self, unit: int) -> Anchor:
        """The last place known at or before a unit."""
        anchor = self._anchors[bisect_right(self._anchors, Anchor(unit, 1 << 62, 0)) - 1]
        if self.span_units:
            span = unit // self.span_units
            if span > anchor.span:
                return Anchor(span * self.span_units, span, 0)
        return anchor

    def _walk(self, anchor: Anchor, unit: int) -> Anchor | None:
        """Measure groups from an anchor on; None where the unit is beyond _WALK of them."""
        for _ in range(_WALK):
            end = anchor.start + self.measure([*self.samples(anchor.span, anchor.group)])[0]
            if unit < end:
                return anchor
            last = anchor.group == self.groups - 1
            anchor = Anchor(end, anchor.span + last, 0 if last else anchor.group + 1)
            self._add(anchor)
        return None

    def _add(self, anchor: Anchor) -> None:
        place = bisect_right(self._anchors, anchor)
        if self._anchors[place - 1] != anchor:
            self._anchors.insert(place, anchor)
            if len(self._anchors) > _ANCHORS_KEPT:
                del self._anchors[1]  # the first is the beginning of the stream

    def _build(self, span: int) -> np.ndarray:
        """Units before each group of a span, and those of the span; int64 [groups + 1]."""
        first, last = span * self.span, (span + 1) * self.span
        starts = [*range(first, last, GROUP), last]
        parts = [starts[place : place + self.together + 1] for place in range(0, self.groups, self.together)]
        threads = min(_THREADS, len(os.sched_getaffinity(0)))  # numpy computes without the interpreter's lock
        with ThreadPoolExecutor(threads) as pool:
            table = np.cumsum([0, *chain.from_iterable(pool.map(self.measure, parts))], dtype=np.int64)
        if self.folder and self.groups > _WALK:  # a smaller one is as quickly measured, and there are many spans of it
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{self.name}-{span:06d}.{os.getpid()}.tmp"
            with open(temporary, "wb") as file:
                np.save(file, table)
            os.replace(temporary, self._path(span))
        return self._keep(span, table)

    def _load(self, span: int) -> np.ndarray | None:
        """A table that this or another process kept; None where there is none."""
        if not self.folder or not self._path(span).is_file():
            return None
        table = np.load(self._path(span), allow_pickle=False)
        if table.shape != (self.groups + 1,) or table.dtype != np.int64:
            raise ValueError(f"{self._path(span)} is no table of {self.groups + 1} numbers; delete it.")
        return self._keep(span, table)

    def _keep(self, span: int, table: np.ndarray) -> np.ndarray:
        self._tables[span] = table
        if len(self._tables) > _TABLES_KEPT:
            self._tables.popitem(last=False)
        return table

    def _path(self, span: int) -> Path:
        return self.folder / f"{self.name}-{span:06d}.npy"
