"""Packings: where samples stand in blocks of `length` = seq_length + 1 tokens.

query                Block p is sample p: as many of its *last* tokens as fit, so the query document stands whole at
                     the end and the farthest retrieved document loses its head. Token 0 is always </s>: where the
                     head is cut, </s> takes the first place again, so every block begins as a prompt does. A shorter
                     sample leaves room, which becomes <pad>.
stream               All samples are concatenated and cut every `length` tokens; a block may begin and end anywhere,
                     and the last one of an epoch goes on into the next epoch: nothing is dropped.
stream_whole_images  As stream, but a block whose cut falls inside a picture begins behind that picture: what the
                     block before cannot hold of it is dropped and counted, the block itself ends earlier, in <pad>.
documents            Whole samples, best fit within windows of samples (best_fit.py).

All are random access: `lay_out(numbers, growth)` needs no block but those asked for.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.stream.layout import Layout
from megatron_cm3leon.data.stream.samples import Lineup, Samples, turn_document
from megatron_cm3leon.data.stream.seek import Anchor, Prefix

_GROUPS_KEPT = 8


class QueryPacking:
    """One query document a block, at its end."""

    cut = "head"
    prefix = None

    def __init__(self, samples: Samples, length: int) -> None:
        self.samples, self.length = samples, length

    @property
    def max_growth(self) -> int:
        """Tokens masking may add and still leave </s> text <break> picture </s> with one token of text."""
        return self.length - self.samples.library.vocabulary.image_tokens - 4

    def lay_out(self, numbers: np.ndarray, growth: np.ndarray) -> Layout:
        """Layout of blocks `numbers` (int64); `growth` is how many tokens masking may add to each."""
        return lay_out_samples(self.samples, numbers, np.full(len(numbers), self.length), growth, self.length)


def lay_out_samples(
    samples: Samples, numbers: np.ndarray, rooms: np.ndarray, growth: np.ndarray, length: int
) -> Layout:
    """One sample a row, each cut to its room as packing=query has it; arrays int64 [samples]."""
    lineup, lengths = samples.line_up(numbers), samples.library.lengths
    rows, columns = lineup.retrieved.shape
    whole = lengths[lineup.queries].astype(np.int64)
    query = np.minimum(whole, rooms - growth - 2)
    # Places counted from the end of the room, </s> last: the query, then retrieved documents, nearest first.
    places = np.empty((rows, columns + 1), np.int64)
    sizes = np.empty((rows, columns + 1), np.int64)
    places[:, columns], sizes[:, columns] = rooms - 1 - query, query
    used = np.ones((rows, columns + 1), bool)
    for column in range(columns - 1, -1, -1):
        number = lineup.retrieved[:, column]
        used[:, column] = (number >= 0) & (places[:, column + 1] > 1)  # place 0 is </s>'s
        sizes[:, column] = np.where(used[:, column], lengths[number].astype(np.int64), -1)
        places[:, column] = places[:, column + 1] - 1 - sizes[:, column]
    firsts = np.maximum(places[:, 0] - 1, 0)  # a sample shorter than its room begins it
    places -= firsts[:, None]
    filled = rooms - firsts
    starts = np.arange(rows) * length
    own_rows, own_columns = np.nonzero(used)
    behind = used[:, :columns]
    ends = (starts[:, None] + places + sizes)[:, :columns]
    return Layout(
        length=length,
        numbers=numbers,
        epochs=lineup.epochs,
        filled=filled,
        query_starts=places[:, columns],
        trimmed=whole - query,
        rows=own_rows,
        documents=np.concatenate([lineup.retrieved, lineup.queries[:, None]], 1)[used],
        image_first=np.concatenate([lineup.retrieved_image_first, lineup.query_image_first[:, None]], 1)[used],
        retrieved=own_columns < columns,
        places=places[used],
        lengths=sizes[used],
        eos=np.concatenate([starts, starts + filled - 1]),
        breaks=ends[behind],
    )


@dataclass
class _Group:
    """Where everything stands in consecutive whole samples, in tokens of the whole stream."""

    anchor: Anchor
    start: int
    end: int
    sample_starts: np.ndarray
    sample_epochs: np.ndarray
    documents: np.ndarray
    image_first: np.ndarray
    retrieved: np.ndarray
    starts: np.ndarray
    """First token of each document."""
    ends: np.ndarray
    """Token behind its last."""
    eos: np.ndarray
    breaks: np.ndarray


def _build_group(lineup: Lineup, lengths: np.ndarray, anchor: Anchor) -> _Group:
    start = anchor.start
    documents = np.concatenate([lineup.retrieved, lineup.queries[:, None]], 1)
    image_first = np.concatenate([lineup.retrieved_image_first, lineup.query_image_first[:, None]], 1)
    present = documents >= 0
    sizes = np.where(present, lengths[documents].astype(np.int64) + 1, 0)  # with the separator behind
    totals = sizes.sum(1) + 1
    ends = start + np.cumsum(totals)
    sample_starts = ends - totals
    stops = (sample_starts[:, None] + 1 + np.cumsum(sizes, 1))[present]
    retrieved = np.broadcast_to(np.arange(documents.shape[1]) < documents.shape[1] - 1, documents.shape)[present]
    return _Group(
        anchor=anchor,
        start=start,
        end=int(ends[-1]),
        sample_starts=sample_starts,
        sample_epochs=lineup.epochs,
        documents=documents[present],
        image_first=image_first[present],
        retrieved=retrieved,
        starts=stops - sizes[present],
        ends=stops - 1,
        eos=np.stack([sample_starts, ends - 1], 1).reshape(-1),
        breaks=(stops - 1)[retrieved],
    )


class StreamPacking:
    """Samples concatenated over all epochs and cut every `length` tokens."""

    cut = "tail"

    def __init__(self, samples: Samples, length: int) -> None:
        self.samples, self.length = samples, length
        same = None
        if samples.repeats:
            same = int(samples.library.lengths.sum(dtype=np.int64)) + 2 * samples.span
        self.prefix = Prefix(samples.span, self._measure, same)
        self._groups: OrderedDict[int, _Group] = OrderedDict()

    @property
    def max_growth(self) -> int:
        """Tokens masking may add: one token of the source has to stay."""
        return self.length - 1

    def lay_out(self, numbers: np.ndarray, growth: np.ndarray) -> Layout:
        """Layout of blocks `numbers` (int64); `growth` is not needed."""
        starts = [number * self.length for number in numbers.tolist()]
        return self._lay_out(numbers, starts, [start + self.length for start in starts])

    def anchor(self, number: int) -> Anchor:
        """The group in which block `number` begins."""
        return self._group(number * self.length).anchor

    def _measure(self, starts: list[int]) -> list[int]:
        lengths = self.samples.lengths(np.arange(starts[0], starts[-1]))
        return np.add.reduceat(lengths, np.array(starts[:-1]) - starts[0]).tolist()

    def _lay_out(self, numbers: np.ndarray, starts: list[int], ends: list[int]) -> Layout:
        """Layout of blocks that hold tokens starts..ends-1 of the whole stream, at most `length` each."""
        group = self._group(starts[0])
        ranges: list[tuple[_Group, list]] = [(group, [])]
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            token = start
            while token < end:
                if not group.start <= token < group.end:
                    group = self._group(token)
                    ranges.append((group, []))
                ranges[-1][1].append((row, token, min(end, group.end), start))
                token = group.end
        parts = [_take_ranges(group, np.array(rows), self.length) for group, rows in ranges if rows]
        epochs, rows, documents, image_first, retrieved, places, lengths, eos, breaks = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        filled = np.array(ends) - np.array(starts)
        nothing = np.zeros(len(numbers), np.int64)
        return Layout(
            length=self.length, numbers=numbers, epochs=epochs, filled=filled, query_starts=nothing, trimmed=nothing,
            rows=rows, documents=documents, image_first=image_first, retrieved=retrieved, places=places,
            lengths=lengths, eos=eos, breaks=breaks,
        )  # fmt: skip

    def _group(self, token: int) -> _Group:
        """The group that holds a token of the whole stream."""
        for group in reversed(self._groups.values()):
            if group.start <= token < group.end:
                return group
        anchor = self.prefix.find(token)
        numbers = np.arange(*self.prefix.samples(anchor.span, anchor.group))
        group = _build_group(self.samples.line_up(numbers), self.samples.library.lengths, anchor)
        self._groups[anchor.start] = group
        if len(self._groups) > _GROUPS_KEPT:
            self._groups.popitem(last=False)
        return group


def _take_ranges(group: _Group, ranges: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """What stands in ranges of a group's tokens: rows of (row, first token, token behind the last, block's start).

    Returns the epochs of the rows that begin here, then Layout's arrays from `rows` on.
    """
    rows, firsts, lasts, origins = ranges.T
    chosen, owners = _between(group.ends, group.starts, firsts, lasts)
    begins = firsts == origins
    epochs = group.sample_epochs[np.searchsorted(group.sample_starts, firsts[begins], "right") - 1]
    eos, eos_owners = _between(group.eos + 1, group.eos, firsts, lasts)
    breaks, break_owners = _between(group.breaks + 1, group.breaks, firsts, lasts)
    shift = rows * length - origins
    return (
        epochs,
        rows[owners],
        group.documents[chosen],
        group.image_first[chosen],
        group.retrieved[chosen],
        group.starts[chosen] - origins[owners],
        group.ends[chosen] - group.starts[chosen],
        group.eos[eos] + shift[eos_owners],
        group.breaks[breaks] + shift[break_owners],
    )


def _between(ends: np.ndarray, starts: np.ndarray, firsts: np.ndarray, lasts: np.ndarray):
    """Of things that stand at starts..ends-1, in order, those that touch each range firsts..lasts-1; and its number."""
    low, high = np.searchsorted(ends, firsts, "right"), np.searchsorted(starts, lasts, "left")
    counts = high - low
    offsets = np.cumsum(counts) - counts
    owners = np.repeat(np.arange(len(firsts)), counts)
    return np.arange(counts.sum()) + (low - offsets)[owners], owners


class WholeImagesPacking(StreamPacking):
    """As stream, but no block begins inside a picture."""

    @property
    def max_growth(self) -> int:
        """As under stream; negative where a picture is longer than a block."""
        needed = self.samples.library.vocabulary.image_tokens + 4
        return self.length - 1 if self.length >= needed else self.length - needed

    def lay_out(self, numbers: np.ndarray, growth: np.ndarray) -> Layout:
        """Layout of blocks `numbers` (int64); `growth` is not needed."""
        cuts = {int(n): self._begin(int(n)) for number in numbers.tolist() for n in (number, number + 1)}
        starts = [cuts[number] for number in numbers.tolist()]
        stops = [cuts[number + 1] for number in numbers.tolist()]
        ends = [min(stop, start + self.length) for start, stop in zip(starts, stops, strict=True)]
        layout = self._lay_out(numbers, starts, ends)
        layout.trimmed = np.array(stops) - np.array(ends)
        return layout

    def _begin(self, number: int) -> int:
        """Token of the whole stream at which a block begins: the cut, or the end of the picture it falls inside."""
        token = number * self.length
        group = self._group(token)
        place = int(np.searchsorted(group.ends, token, "right"))
        if place == len(group.ends) or group.starts[place] >= token:
            return token
        library = self.samples.library
        ids = library.read(int(group.documents[place]))
        ids = np.concatenate(turn_document(ids, bool(group.image_first[place]), library.vocabulary))
        inside = token - int(group.starts[place])
        image = library.vocabulary.is_image(ids[inside - 1 :])
        if not image[:2].all():  # the cut is not between two tokens of one picture
            return token
        others = np.flatnonzero(~image)
        return token + (int(others[0]) if len(others) else len(image)) - 1
