"""Prefix sums for random access: token or sequence -> group of samples.

A unit of the stream is a token or a sequence, as the packing chooses. Samples are divided into groups of GROUP; the
number of units in a group is known only after measuring it. Groups restart at each span (an epoch). The group of a
unit is found with one of these, tried in this order:

    an anchor   a position found before, or the cursor of a checkpoint: groups are measured from there on
    a table     the units before each group of a span, one number per group: built when a unit is far from every
                anchor, kept in memory and, if a folder is given, on disk under the stream's hash
    arithmetic  if every span has the same number of units, complete spans are skipped by division

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
"""Samples per group."""
_WALK = 64
"""Groups that are measured from an anchor before a table is built instead."""
_ANCHORS_KEPT, _TABLES_KEPT = 1024, 4
_THREADS, _GROUPS_PER_CALL = 8, 4


@dataclass(frozen=True, order=True)
class Anchor:
    """The first unit of a group of samples, as its number in the stream, and the group (`group` of span `span`)."""

    start: int
    span: int
    group: int

    def to_dict(self) -> dict:
        """The cursor that checkpoints hold."""
        return {"start": self.start, "span": self.span, "group": self.group}

    @classmethod
    def from_dict(cls, cursor: dict) -> "Anchor":
        """The anchor of a cursor."""
        return cls(cursor["start"], cursor["span"], cursor["group"])


class PrefixSums:
    """Finds units of a stream whose spans have `span` samples each."""

    def __init__(
        self,
        span: int,
        measure: Callable[[list[int]], list[int]],
        span_units: int | None = None,
        groups_per_call: int = _GROUPS_PER_CALL,
    ) -> None:
        """`measure([first, .., last])` counts the units of consecutive groups, given their first samples and the end.

        `span_units`: units per span, if it is the same for every span; `groups_per_call`: groups measured in one call.
        """
        self.span, self.measure, self.span_units = span, measure, span_units
        self.groups_per_call = groups_per_call
        self.groups = -(-span // GROUP)
        self.folder: Path | None = None
        self.name = ""
        self._anchors = [Anchor(0, 0, 0)]
        self._tables: OrderedDict[int, np.ndarray] = OrderedDict()

    def keep_tables(self, folder: Path, name: str) -> None:
        """Store tables in `folder` under `name`, which must identify everything that determines them."""
        self.folder, self.name = folder, name

    def samples(self, span: int, group: int) -> tuple[int, int]:
        """First sample of a group, and one past its last."""
        first = span * self.span + group * GROUP
        return first, min(first + GROUP, (span + 1) * self.span)

    def find(self, unit: int) -> Anchor:
        """The anchor of the group that holds a unit."""
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
        """Add the anchor of a checkpoint's cursor."""
        self._add(Anchor.from_dict(cursor))

    def _nearest(self, unit: int) -> Anchor:
        """The last known anchor at or before a unit."""
        anchor = self._anchors[bisect_right(self._anchors, Anchor(unit, 1 << 62, 0)) - 1]
        if self.span_units:
            span = unit // self.span_units
            if span > anchor.span:
                return Anchor(span * self.span_units, span, 0)
        return anchor

    def _walk(self, anchor: Anchor, unit: int) -> Anchor | None:
        """Measure groups from an anchor on; None if the unit is more than _WALK groups away."""
        for _ in range(_WALK):
            end = anchor.start + self.measure([*self.samples(anchor.span, anchor.group)])[0]
            if unit < end:
                return anchor
            last = anchor.group == self.groups - 1
            anchor = Anchor(end, anchor.span + last, 0 if last else anchor.group + 1)
            self._add(anchor)
        return None

    def _add(self, anchor: Anchor) -> None:
        index = bisect_right(self._anchors, anchor)
        if self._anchors[index - 1] != anchor:
            self._anchors.insert(index, anchor)
            if len(self._anchors) > _ANCHORS_KEPT:
                del self._anchors[1]  # the first is the beginning of the stream

    def _build(self, span: int) -> np.ndarray:
        """Units before each group of a span, and in the whole span; int64 [groups + 1]."""
        first, last = span * self.span, (span + 1) * self.span
        starts = [*range(first, last, GROUP), last]
        step = self.groups_per_call
        parts = [starts[first_group : first_group + step + 1] for first_group in range(0, self.groups, step)]
        threads = min(_THREADS, len(os.sched_getaffinity(0)))  # numpy computes without the interpreter's lock
        with ThreadPoolExecutor(threads) as pool:
            table = np.cumsum([0, *chain.from_iterable(pool.map(self.measure, parts))], dtype=np.int64)
        if self.folder and self.groups > _WALK:  # a small table is measured as fast as it is read, and there are many
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{self.name}-{span:06d}.{os.getpid()}.tmp"
            with open(temporary, "wb") as file:
                np.save(file, table)
            os.replace(temporary, self.folder / self._file_name(span))
        return self._keep(span, table)

    def _load(self, span: int) -> np.ndarray | None:
        """A table that this or another process stored; None if there is none. ValueError if it is damaged."""
        path = self.folder / self._file_name(span) if self.folder else None
        if not path or not path.is_file():
            return None
        table = np.load(path, allow_pickle=False)
        if table.shape != (self.groups + 1,) or table.dtype != np.int64:
            raise ValueError(f"{path} is not a table of {self.groups + 1} integers; delete it, it will be built again.")
        return self._keep(span, table)

    def _keep(self, span: int, table: np.ndarray) -> np.ndarray:
        self._tables[span] = table
        if len(self._tables) > _TABLES_KEPT:
            self._tables.popitem(last=False)
        return table

    def _file_name(self, span: int) -> str:
        return f"{self.name}-{span:06d}.npy"
