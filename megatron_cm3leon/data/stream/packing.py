"""Packings: how samples fill sequences of `length` = seq_length + 1 tokens.

query                Sequence p is sample p: as many of its *last* tokens as fit, so the query document is complete at
                     the end, and the least similar retrieved document loses its head. Token 0 is always </s>, also
                     if the head is cut, so every sequence begins as a prompt does. A shorter sample is padded.
stream               All samples are concatenated and cut every `length` tokens; a sequence may begin and end anywhere,
                     and the last sequence of an epoch continues into the next epoch: no token is dropped.
stream_whole_images  As stream, but a sequence whose cut falls inside an image begins after that image: the tokens
                     of the image that the previous sequence cannot hold are dropped and counted, and the sequence
                     itself ends earlier, in <pad>.
documents            Complete samples, best fit within windows of samples (best_fit.py).

All packings are random access: `lay_out(numbers, ...)` computes the requested sequences alone.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.stream.layout import Layout, read_document
from megatron_cm3leon.data.stream.samples import SampleDocuments, Samples
from megatron_cm3leon.data.stream.seek import Anchor, PrefixSums
from megatron_cm3leon.data.stream.targets import MASKED, PRETRAINING

_GROUPS_KEPT = 8


class Packing(ABC):
    """How samples fill sequences of `length` tokens."""

    cut: str
    """Side that masking cuts to make room: "head" or "tail" (cm3.cut_source)."""
    keeps_documents: bool = True
    """Whether a sequence holds complete query documents, unless one is longer than a sequence."""
    prefix_sums: PrefixSums | None = None
    """Finds the samples of a sequence; None if sequence n is sample n."""

    def __init__(self, samples: Samples, length: int) -> None:
        self.samples, self.length = samples, length

    @property
    @abstractmethod
    def max_growth(self) -> int:
        """Maximum tokens that masking may add to a sequence; negative if `length` is too short for the data."""

    @abstractmethod
    def lay_out(self, numbers: np.ndarray, growth: np.ndarray, without_documents: np.ndarray) -> Layout:
        """Layout of sequences `numbers` (int64).

        `growth`: how many tokens masking may add to each (int64); `without_documents`: which ones have no retrieved
        documents (bool; only packing=query reads it).
        """

    def anchor(self, number: int) -> Anchor | None:
        """Position of sequence `number` for a cursor; None if it needs none."""
        return None


class QueryPacking(Packing):
    """One query document per sequence, at its end."""

    cut = "head"

    @property
    def max_growth(self) -> int:
        """Maximum tokens that masking may add: </s> text <break> image </s> must fit with one token of text."""
        return self.length - self.samples.corpus.vocabulary.image_tokens - 4

    def lay_out(self, numbers: np.ndarray, growth: np.ndarray, without_documents: np.ndarray) -> Layout:
        """Layout of sequences `numbers`; the arguments are those of `Packing.lay_out`."""
        rooms = np.full(len(numbers), self.length)
        return lay_out_samples(self.samples, numbers, rooms, growth, self.length, without_documents)


def lay_out_samples(
    samples: Samples, numbers: np.ndarray, rooms: np.ndarray, growth: np.ndarray, length: int,
    without_documents: np.ndarray | None = None,
) -> Layout:  # fmt: skip
    """One sample per row, each cut to its room (tokens) as under packing=query; arrays int64 [samples].

    `without_documents`, bool [samples]: samples without their retrieved documents.
    """
    chosen, lengths = samples.choose_documents(numbers), samples.corpus.lengths
    rows, columns = chosen.retrieved.shape
    if without_documents is not None:
        chosen.retrieved[without_documents] = -1
    complete, forms = chosen.query_lengths, chosen.query_forms
    ends_itself = forms == MASKED  # the </s> after the query is in the document, before the moved targets
    growth = np.where(forms == PRETRAINING, growth, 0)  # CM3 masking cuts no document with targets (stream.py)
    query = np.minimum(complete, rooms - growth - 2 + ends_itself)
    # Computed from the end of the room backward, </s> last: the query, then retrieved documents, most similar first.
    first_tokens = np.empty((rows, columns + 1), np.int64)
    sizes = np.empty((rows, columns + 1), np.int64)
    first_tokens[:, columns], sizes[:, columns] = rooms - 1 + ends_itself - query, query
    used = np.ones((rows, columns + 1), bool)
    for column in range(columns - 1, -1, -1):
        number = chosen.retrieved[:, column]
        used[:, column] = (number >= 0) & (first_tokens[:, column + 1] > 1)  # position 0 holds </s>
        sizes[:, column] = np.where(used[:, column], lengths[number].astype(np.int64), -1)
        first_tokens[:, column] = first_tokens[:, column + 1] - 1 - sizes[:, column]
    firsts = np.maximum(first_tokens[:, 0] - 1, 0)  # a sample shorter than its room moves to its beginning
    first_tokens -= firsts[:, None]
    filled = rooms - firsts
    starts = np.arange(rows) * length
    used_rows, used_columns = np.nonzero(used)
    ends = (starts[:, None] + first_tokens + sizes)[:, :columns]
    shortened = np.zeros((rows, columns + 1), bool)
    shortened[:, columns] = query < complete
    return Layout(
        length=length,
        numbers=numbers,
        epochs=chosen.epochs,
        filled=filled,
        query_starts=first_tokens[:, columns],
        trimmed=complete - query,
        rows=used_rows,
        documents=np.concatenate([chosen.retrieved, chosen.queries[:, None]], 1)[used],
        image_first=np.concatenate([chosen.retrieved_image_first, chosen.query_image_first[:, None]], 1)[used],
        retrieved=used_columns < columns,
        forms=np.concatenate([chosen.retrieved_forms, forms[:, None]], 1)[used],
        shortened=shortened[used],
        starts=first_tokens[used],
        lengths=sizes[used],
        eos=np.concatenate([starts, (starts + filled - 1)[~ends_itself]]),
        breaks=ends[used[:, :columns]],
    )


@dataclass
class _Group:
    """Positions of documents and separators of consecutive samples, counted in tokens of the whole stream."""

    anchor: Anchor
    start: int
    end: int
    sample_starts: np.ndarray
    sample_epochs: np.ndarray
    documents: np.ndarray
    image_first: np.ndarray
    retrieved: np.ndarray
    forms: np.ndarray
    starts: np.ndarray
    """First token of each document."""
    ends: np.ndarray
    """One past its last token."""
    eos: np.ndarray
    breaks: np.ndarray


def _build_group(chosen: SampleDocuments, lengths: np.ndarray, anchor: Anchor) -> _Group:
    start = anchor.start
    documents = np.concatenate([chosen.retrieved, chosen.queries[:, None]], 1)
    image_first = np.concatenate([chosen.retrieved_image_first, chosen.query_image_first[:, None]], 1)
    present = documents >= 0
    separators = present.astype(np.int64)
    separators[:, -1] = chosen.query_forms != MASKED  # which includes its </s>
    tokens = np.where(present, lengths[documents].astype(np.int64), 0)
    tokens[:, -1] = chosen.query_lengths
    sizes = tokens + separators
    totals = sizes.sum(1) + 1
    ends = start + np.cumsum(totals)
    sample_starts = ends - totals
    stops = (sample_starts[:, None] + 1 + np.cumsum(sizes, 1))[present]
    retrieved = np.broadcast_to(np.arange(documents.shape[1]) < documents.shape[1] - 1, documents.shape)[present]
    stops -= separators[present]
    eos = np.stack([sample_starts, ends - 1], 1)
    is_eos = np.stack([np.ones(len(ends), bool), chosen.query_forms != MASKED], 1)
    return _Group(
        anchor=anchor,
        start=start,
        end=int(ends[-1]),
        sample_starts=sample_starts,
        sample_epochs=chosen.epochs,
        documents=documents[present],
        image_first=image_first[present],
        retrieved=retrieved,
        forms=np.concatenate([chosen.retrieved_forms, chosen.query_forms[:, None]], 1)[present],
        starts=stops - tokens[present],
        ends=stops,
        eos=eos[is_eos],
        breaks=stops[retrieved],
    )


class StreamPacking(Packing):
    """Samples concatenated over all epochs and cut every `length` tokens."""

    cut = "tail"
    keeps_documents = False
    prefix_sums: PrefixSums

    def __init__(self, samples: Samples, length: int) -> None:
        super().__init__(samples, length)
        span_tokens = None
        if samples.repeats:
            span_tokens = samples.count_tokens()
        self.prefix_sums = PrefixSums(samples.span, self._measure, span_tokens)
        self._groups: OrderedDict[int, _Group] = OrderedDict()

    @property
    def max_growth(self) -> int:
        """Maximum tokens that masking may add: at least one token of the source must remain."""
        return self.length - 1

    def lay_out(self, numbers: np.ndarray, growth: np.ndarray, without_documents: np.ndarray) -> Layout:
        """Layout of sequences `numbers` (int64); the others are not used."""
        starts = [number * self.length for number in numbers.tolist()]
        return self._lay_out(numbers, starts, [start + self.length for start in starts])

    def anchor(self, number: int) -> Anchor:
        """The group in which sequence `number` begins."""
        return self._group(number * self.length).anchor

    def _measure(self, starts: list[int]) -> list[int]:
        lengths = self.samples.lengths(np.arange(starts[0], starts[-1]))
        return np.add.reduceat(lengths, np.array(starts[:-1]) - starts[0]).tolist()

    def _lay_out(self, numbers: np.ndarray, starts: list[int], ends: list[int]) -> Layout:
        """Layout of sequences that hold tokens starts..ends-1 of the whole stream, at most `length` each."""
        group = self._group(starts[0])
        ranges: list[tuple[_Group, list[tuple[int, int, int, int]]]] = [(group, [])]
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            token = start
            while token < end:
                if not group.start <= token < group.end:
                    group = self._group(token)
                    ranges.append((group, []))
                ranges[-1][1].append((row, token, min(end, group.end), start))
                token = group.end
        parts = [_take_ranges(group, np.array(rows), self.length) for group, rows in ranges if rows]
        epochs, rows, documents, image_first, retrieved, forms, first_tokens, lengths, eos, breaks = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        filled = np.array(ends) - np.array(starts)
        zeros = np.zeros(len(numbers), np.int64)
        return Layout(
            length=self.length, numbers=numbers, epochs=epochs, filled=filled, query_starts=zeros, trimmed=zeros,
            rows=rows, documents=documents, image_first=image_first, retrieved=retrieved, forms=forms,
            shortened=np.zeros(len(rows), bool), starts=first_tokens, lengths=lengths, eos=eos, breaks=breaks,
        )  # fmt: skip

    def _group(self, token: int) -> _Group:
        """The group that holds a token of the whole stream."""
        for group in reversed(self._groups.values()):
            if group.start <= token < group.end:
                return group
        anchor = self.prefix_sums.find(token)
        numbers = np.arange(*self.prefix_sums.samples(anchor.span, anchor.group))
        group = _build_group(self.samples.choose_documents(numbers), self.samples.corpus.lengths, anchor)
        self._groups[anchor.start] = group
        if len(self._groups) > _GROUPS_KEPT:
            self._groups.popitem(last=False)
        return group


def _take_ranges(group: _Group, ranges: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """Documents and separators in ranges of a group's tokens; range: (row, first token, end, start of the sequence).

    Returns the epochs of the rows that begin in this group, then the arrays of Layout from `rows` on.
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
        group.forms[chosen],
        group.starts[chosen] - origins[owners],
        group.ends[chosen] - group.starts[chosen],
        group.eos[eos] + shift[eos_owners],
        group.breaks[breaks] + shift[break_owners],
    )


def _between(ends: np.ndarray, starts: np.ndarray, firsts: np.ndarray, lasts: np.ndarray) -> list[np.ndarray]:
    """Indices of the sorted intervals [starts, ends) that overlap each range [firsts, lasts), and the range of each."""
    low, high = np.searchsorted(ends, firsts, "right"), np.searchsorted(starts, lasts, "left")
    counts = high - low
    offsets = np.cumsum(counts) - counts
    owners = np.repeat(np.arange(len(firsts)), counts)
    return [np.arange(counts.sum()) + (low - offsets)[owners], owners]


class WholeImagesPacking(StreamPacking):
    """As stream, but no sequence begins inside an image."""

    @property
    def max_growth(self) -> int:
        """As under stream; negative if an image does not fit into a sequence."""
        needed = self.samples.corpus.vocabulary.image_tokens + 4
        return self.length - 1 if self.length >= needed else self.length - needed

    def lay_out(self, numbers: np.ndarray, growth: np.ndarray, without_documents: np.ndarray) -> Layout:
        """Layout of sequences `numbers` (int64); the others are not used."""
        cuts = {int(n): self._begin(int(n)) for number in numbers.tolist() for n in (number, number + 1)}
        starts = [cuts[number] for number in numbers.tolist()]
        stops = [cuts[number + 1] for number in numbers.tolist()]
        ends = [min(stop, start + self.length) for start, stop in zip(starts, stops, strict=True)]
        layout = self._lay_out(numbers, starts, ends)
        layout.trimmed = np.array(stops) - np.array(ends)
        return layout

    def _begin(self, number: int) -> int:
        """Token of the whole stream at which a sequence begins: the cut, or the end of the image that it falls in."""
        token = number * self.length
        group = self._group(token)
        index = int(np.searchsorted(group.ends, token, "right"))
        if index == len(group.ends) or group.starts[index] >= token:
            return token
        corpus = self.samples.corpus
        ids = read_document(
            corpus, int(group.documents[index]), bool(group.image_first[index]), int(group.forms[index])
        )
        inside = token - int(group.starts[index])
        image = corpus.vocabulary.is_image(ids[inside - 1 :])
        if not image[:2].all():  # the cut is not between two tokens of one image
            return token
        others = np.flatnonzero(~image)
        return token + (int(others[0]) if len(others) else len(image)) - 1
