"""packing=documents: complete samples, best fit within windows of consecutive samples.

A window is a group of the prefix sums (4,096 samples). Its samples are packed into sequences by the best of three
packers: in order; longest first, each into the fullest sequence that still has room; in order, but each sequence closed
with the sample that fits best. Each packer wins for some distribution of lengths, and the stream of existing runs
depends on the choice. The sequences of a window are then put in a random order, and the samples of a sequence in the
order of the stream. A sample longer than a sequence is cut as under packing=query: the head of its retrieved documents
first, then text of the query, which is counted.
"""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from itertools import accumulate

import numpy as np

from megatron_cm3leon.data.stream.layout import Layout
from megatron_cm3leon.data.stream.order import derive_key, permute
from megatron_cm3leon.data.stream.packing import Packing, lay_out_samples
from megatron_cm3leon.data.stream.samples import Samples
from megatron_cm3leon.data.stream.seek import Anchor, PrefixSums

_WINDOWS_KEPT, _WINDOWS_PER_CALL = 8, 64


def pack_in_order(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of the items in each bin of at most `room`; the bins are filled one after another."""
    ends = list(accumulate(lengths, initial=0))
    bins, first = [], 0
    while first < len(lengths):
        last = bisect_right(ends, ends[first] + room) - 1
        bins.append(list(range(first, last)))
        first = last
    return bins


def pack_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of the items in each bin of at most `room`; longest first, each in the fullest bin that has room."""
    items = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []
    start = 0
    while start < len(items):
        size = lengths[items[start]]
        found = bisect_left(rooms, size)
        left = rooms[found] if found < len(rooms) else room
        bins = by_room.get(left) if found < len(rooms) else None
        # The following items have at most this size. Items of the same size go into this bin while they fit.
        stop = start + 1
        while stop < len(items) and lengths[items[stop]] == size and (stop - start + 1) * size <= left:
            stop += 1
        taken = bins.pop() if bins else []
        if bins is not None and not bins:
            del by_room[left], rooms[found]
        taken += items[start:stop]
        rest = left - (stop - start) * size
        if rest not in by_room:
            by_room[rest] = []
            insort(rooms, rest)
        by_room[rest].append(taken)
        start = stop
    return [one_bin for bins in by_room.values() for one_bin in bins]


def pack_closing(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of the items in each bin of at most `room`, filled in order, but closed with the best-fitting item left.

    If many samples fit into a sequence and their lengths are similar, longest first leaves the same unused room in
    every sequence; this packer leaves almost none.
    """
    by_size: dict[int, list[int]] = {}
    for item in range(len(lengths) - 1, -1, -1):
        by_size.setdefault(lengths[item], []).append(item)  # pop() takes the first in order
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
            elif left - size < sizes[0] <= left - sizes[0]:  # leave room for one more
                size = sizes[bisect_right(sizes, left - sizes[0]) - 1]
            elif size > left:
                size = sizes[bisect_right(sizes, left) - 1]
            taken.append(take(size))
            left -= size
        bins.append(taken)
    return bins


def count_bins(lengths: np.ndarray, firsts: np.ndarray, room: int) -> np.ndarray:
    """Number of bins that pack_window() uses for each window, int64 [windows]; window i begins at item `firsts[i]`.

    First, vectorized code packs all windows together, with items in their given order (pack_in_order). Where that
    reaches the lower bound, as with pairs of one image size, pack_window() is not called.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    starts, stops = firsts.copy(), np.append(firsts[1:], len(lengths))
    items, sums, shortest = stops - firsts, np.add.reduceat(lengths, firsts), np.minimum.reduceat(lengths, firsts)
    single = 2 * shortest > room  # no two fit into one bin, as with retrieved documents in context
    counts, unfinished = np.where(single, items, 0), np.flatnonzero(~single)
    while len(unfinished):
        last = np.searchsorted(ends, ends[starts[unfinished]] + room, "right") - 1
        starts[unfinished] = np.minimum(last, stops[unfinished])
        counts[unfinished] += 1
        unfinished = unfinished[starts[unfinished] < stops[unfinished]]
    for window in np.flatnonzero(counts > _lower_bound(sums, items, shortest, room)).tolist():
        counts[window] = len(pack_window(lengths[firsts[window] : stops[window]], room))
    return counts


def _lower_bound(total, items, shortest, room: int):
    """Minimum number of bins, from the sum of the lengths and from how many of the shortest fit into one."""
    return np.maximum(-(-total // room), -(-items // (room // shortest)))


def pack_window(lengths: np.ndarray, room: int) -> list[list[int]]:
    """The bins of the packer that needs the fewest; of equal results, that of the first packer."""
    items = lengths.tolist()
    ordered = pack_in_order(items, room)
    minimum = _lower_bound(sum(items), len(items), min(items), room)
    if len(ordered) == minimum:
        return ordered
    fitted = pack_best_fit(items, room)
    if len(fitted) == minimum:
        return fitted
    return min(ordered, fitted, pack_closing(items, room), key=len)


class DocumentsPacking(Packing):
    """Complete samples, several per sequence."""

    cut = "tail"
    prefix_sums: PrefixSums

    def __init__(self, samples: Samples, length: int) -> None:
        super().__init__(samples, length)
        self.prefix_sums = PrefixSums(samples.span, self._measure, groups_per_call=_WINDOWS_PER_CALL)
        self._windows: OrderedDict[int, tuple[Anchor, list[list[int]]]] = OrderedDict()

    @property
    def max_growth(self) -> int:
        """Maximum tokens that masking may add: one token of the source must remain, and a cut query keeps its image."""
        needed = self.samples.corpus.vocabulary.image_tokens + 4
        return self.length - 1 if self.length >= needed else self.length - needed

    def lay_out(self, numbers: np.ndarray, growth: np.ndarray, without_documents: np.ndarray) -> Layout:
        """Layout of sequences `numbers` (int64); the others are not used."""
        samples_of_row = [self._find_samples(number) for number in numbers.tolist()]
        counts = np.array([len(samples) for samples in samples_of_row])
        rows = np.repeat(np.arange(len(counts)), counts)
        samples, length = np.concatenate(samples_of_row), self.length
        zeros = np.zeros(len(samples), np.int64)
        layout = lay_out_samples(self.samples, samples, zeros + length, zeros, length)
        firsts = np.cumsum(counts) - counts
        ends = np.cumsum(layout.filled)
        offsets = ends - layout.filled - np.repeat((ends - layout.filled)[firsts], counts)
        shift = (rows - np.arange(len(samples))) * length + offsets  # of the tokens of each sample
        trimmed = np.bincount(rows, layout.trimmed, len(counts)).astype(np.int64)
        return Layout(
            length=length,
            numbers=numbers,
            epochs=layout.epochs[firsts],
            filled=np.add.reduceat(layout.filled, firsts),
            query_starts=np.zeros(len(counts), np.int64),
            trimmed=trimmed,
            rows=rows[layout.rows],
            documents=layout.documents,
            image_first=layout.image_first,
            retrieved=layout.retrieved,
            forms=layout.forms,
            shortened=layout.shortened,
            starts=layout.starts + offsets[layout.rows],
            lengths=layout.lengths,
            eos=layout.eos + shift[layout.eos // length],
            breaks=layout.breaks + shift[layout.breaks // length],
        )

    def anchor(self, number: int) -> Anchor:
        """The window of sequence `number`."""
        return self._window(number)[0]

    def _find_samples(self, number: int) -> np.ndarray:
        """The numbers of the samples in a sequence, ascending."""
        anchor, sequences = self._window(number)
        first, _ = self.prefix_sums.samples(anchor.span, anchor.group)
        return first + np.sort(sequences[number - anchor.start])

    def _window(self, number: int) -> tuple[Anchor, list[list[int]]]:
        """The window that holds a sequence, and the indices of its samples in each of its sequences."""
        for anchor, sequences in reversed(self._windows.values()):
            if anchor.start <= number < anchor.start + len(sequences):
                return anchor, sequences
        anchor = self.prefix_sums.find(number)
        first, last = self.prefix_sums.samples(anchor.span, anchor.group)
        packed = pack_window(self._lengths(first, last), self.length)
        key = derive_key(self.samples.seed, "documents", anchor.span, anchor.group)
        order = permute(np.arange(len(packed)), len(packed), key).tolist()
        sequences = [packed[index] for index in order]
        self._windows[anchor.start] = anchor, sequences
        if len(self._windows) > _WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return anchor, sequences

    def _measure(self, starts: list[int]) -> list[int]:
        return count_bins(self._lengths(starts[0], starts[-1]), np.array(starts[:-1]) - starts[0], self.length).tolist()

    def _lengths(self, first: int, last: int) -> np.ndarray:
        """Tokens of samples, at most those of a sequence, int64 [last - first]."""
        return np.minimum(self.samples.lengths(np.arange(first, last)), self.length)
