"""packing=documents: whole samples, best fit within windows of consecutive samples.

A window is a group of the prefix table (4,096 samples). Its samples go into blocks in the best of three ways: in their
order; longest first, each into the fullest block that still has room; in their order, but each block closed with the
sample that fits best. A window's blocks then stand in a random order of their own, and a block's samples in the order
of the stream. What a sample longer than a block loses is what packing=query would cut: the head of its retrieved
documents, then text of the query, which is counted.
"""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from itertools import accumulate

import numpy as np

from megatron_cm3leon.data.stream.layout import Layout
from megatron_cm3leon.data.stream.order import derive_key, permute
from megatron_cm3leon.data.stream.packing import lay_out_samples
from megatron_cm3leon.data.stream.samples import Samples
from megatron_cm3leon.data.stream.seek import Anchor, Prefix

_WINDOWS_KEPT, _WINDOWS_TOGETHER = 8, 64


def pack_in_order(lengths: list[int], room: int) -> list[list[int]]:
    """Bins of at most `room`, filled one after another; numbers of the items in each."""
    ends = list(accumulate(lengths, initial=0))
    bins, first = [], 0
    while first < len(lengths):
        last = bisect_right(ends, ends[first] + room) - 1
        bins.append(list(range(first, last)))
        first = last
    return bins


def pack_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Bins of at most `room`; each item, longest first, in the bin with the least room that holds it."""
    items = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []
    place = 0
    while place < len(items):
        size = lengths[items[place]]
        found = bisect_left(rooms, size)
        left = rooms[found] if found < len(rooms) else room
        bins = by_room.get(left) if found < len(rooms) else None
        # What follows has at most this size. Items of one size fill this bin, as far as they go.
        stop = place + 1
        while stop < len(items) and lengths[items[stop]] == size and (stop - place + 1) * size <= left:
            stop += 1
        taken = bins.pop() if bins else []
        if bins is not None and not bins:
            del by_room[left], rooms[found]
        taken += items[place:stop]
        rest = left - (stop - place) * size
        if rest not in by_room:
            by_room[rest] = []
            insort(rooms, rest)
        by_room[rest].append(taken)
        place = stop
    return [each for bins in by_room.values() for each in bins]


def pack_closing(lengths: list[int], room: int) -> list[list[int]]:
    """Bins of at most `room`, filled in order, but each closed with the item that fits best of all that are left.

    Where many samples go into a block and their lengths differ little, longest first leaves the same rest in every
    block; this leaves almost none.
    """
    by_size: dict[int, list[int]] = {}
    for item in range(len(lengths) - 1, -1, -1):
        by_size.setdefault(lengths[item], []).append(item)  # the first in order is taken first
    sizes, used = sorted(by_size), [False] * len(lengths)
    bins: list[list[int]] = []
    following = done = 0

    def take(size: int) -> int:
        nonlocal done
        items = by_size[size]
        item = items.pop()
        if not items:
            del by_size[size], sizes[bisect_left(sizes, size)]
        used[item], done = True, done + 1
        return item

    while done < len(lengths):
        left, taken = room, []
        while sizes and left >= sizes[0]:
            while used[following]:
                following += 1
            size = lengths[following]
            if left <= sizes[-1]:  # the last one: the longest that fits
                size = sizes[bisect_right(sizes, left) - 1]
            elif left - size < sizes[0] <= left - sizes[0]:  # leaves room for one more
                size = sizes[bisect_right(sizes, left - sizes[0]) - 1]
            elif size > left:
                size = sizes[bisect_right(sizes, left) - 1]
            taken.append(take(size))
            left -= size
        bins.append(taken)
    return bins


def count_bins(lengths: np.ndarray, firsts: np.ndarray, room: int) -> np.ndarray:
    """`len(pack_window(..))` of consecutive windows that begin at `firsts`, int64 [windows].

    Filling in order is done for all windows at once; those it does best, as with pairs of one picture size, are ready.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    places, stops = firsts.copy(), np.append(firsts[1:], len(lengths))
    items, sums, least = stops - firsts, np.add.reduceat(lengths, firsts), np.minimum.reduceat(lengths, firsts)
    alone = 2 * least > room  # no two go into one bin, as with retrieved documents in front
    counts, going = np.where(alone, items, 0), np.flatnonzero(~alone)
    while len(going):
        last = np.searchsorted(ends, ends[places[going]] + room, "right") - 1
        places[going] = np.minimum(last, stops[going])
        counts[going] += 1
        going = going[places[going] < stops[going]]
    for window in np.flatnonzero(counts > _fewest(sums, items, least, room)).tolist():
        counts[window] = len(pack_window(lengths[firsts[window] : stops[window]], room))
    return counts


def _fewest(total, items, shortest, room: int):
    """Bins that any packing needs: by the sum of the lengths, and by how many of the shortest go into one."""
    return np.maximum(-(-total // room), -(-items // (room // shortest)))


def pack_window(lengths: np.ndarray, room: int) -> list[list[int]]:
    """The fewest bins that any of the three ways finds; of equals, those of the first."""
    items = lengths.tolist()
    ordered = pack_in_order(items, room)
    fewest = _fewest(sum(items), len(items), min(items), room)
    if len(ordered) == fewest:
        return ordered
    fitted = pack_best_fit(items, room)
    if len(fitted) == fewest:
        return fitted
    return min(ordered, fitted, pack_closing(items, room), key=len)


class DocumentsPacking:
    """Whole samples, several a block."""

    cut = "tail"

    def __init__(self, samples: Samples, length: int) -> None:
        self.samples, self.length = samples, length
        self.prefix = Prefix(samples.span, self._measure, together=_WINDOWS_TOGETHER)
        self._windows: OrderedDict[int, tuple[Anchor, list[list[int]]]] = OrderedDict()

    @property
    def max_growth(self) -> int:
        """Tokens masking may add: one token of the source has to stay; a shortened query keeps its picture."""
        needed = self.samples.library.vocabulary.image_tokens + 4
        return self.length - 1 if self.length >= needed else self.length - needed

    def lay_out(self, numbers: np.ndarray, growth: np.ndarray) -> Layout:
        """Layout of blocks `numbers` (int64); `growth` is not needed."""
        blocks = [self._block(number) for number in numbers.tolist()]
        counts = np.array([len(block) for block in blocks])
        rows = np.repeat(np.arange(len(blocks)), counts)
        samples, length = np.concatenate(blocks), self.length
        nothing = np.zeros(len(samples), np.int64)
        layout = lay_out_samples(self.samples, samples, nothing + length, nothing, length)
        firsts = np.cumsum(counts) - counts
        ends = np.cumsum(layout.filled)
        offsets = ends - layout.filled - np.repeat((ends - layout.filled)[firsts], counts)
        shift = (rows - np.arange(len(samples))) * length + offsets  # of a token of each sample
        trimmed = np.bincount(rows, layout.trimmed, len(blocks)).astype(np.int64)
        return Layout(
            length=length,
            numbers=numbers,
            epochs=layout.epochs[firsts],
            filled=np.add.reduceat(layout.filled, firsts),
            query_starts=np.zeros(len(blocks), np.int64),
            trimmed=trimmed,
            rows=rows[layout.rows],
            documents=layout.documents,
            image_first=layout.image_first,
            retrieved=layout.retrieved,
            places=layout.places + offsets[layout.rows],
            lengths=layout.lengths,
            eos=layout.eos + shift[layout.eos // length],
            breaks=layout.breaks + shift[layout.breaks // length],
        )

    def anchor(self, number: int) -> Anchor:
        """The window of block `number`."""
        return self._window(number)[0]

    def _block(self, number: int) -> np.ndarray:
        """The samples of a block."""
        anchor, blocks = self._window(number)
        first, _ = self.prefix.samples(anchor.span, anchor.group)
        return first + np.sort(blocks[number - anchor.start])

    def _window(self, number: int) -> tuple[Anchor, list[list[int]]]:
        """The window that holds a block, and which of its samples are in each of its blocks."""
        for anchor, blocks in reversed(self._windows.values()):
            if anchor.start <= number < anchor.start + len(blocks):
                return anchor, blocks
        anchor = self.prefix.find(number)
        first, last = self.prefix.samples(anchor.span, anchor.group)
        packed = pack_window(self._lengths(first, last), self.length)
        key = derive_key(self.samples.seed, "documents", anchor.span, anchor.group)
        order = permute(np.arange(len(packed)), len(packed), key).tolist()
        blocks = [packed[place] for place in order]
        self._windows[anchor.start] = anchor, blocks
        if len(self._windows) > _WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return anchor, blocks

    def _measure(self, starts: list[int]) -> list[int]:
        return count_bins(self._lengths(starts[0], starts[-1]), np.array(starts[:-1]) - starts[0], self.length).tolist()

    def _lengths(self, first: int, last: int) -> np.ndarray:
        """Tokens of samples, each cut to a block, int64 [last - first]."""
        return np.minimum(self.samples.lengths(np.arange(first, last)), self.length)
