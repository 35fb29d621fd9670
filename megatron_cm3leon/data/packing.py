"""Packings: how samples become the sources of blocks, each up to `length` = seq_length + 1 tokens.

query   Block p is sample p: as many of its *last* tokens as fit, so the query document stands whole at the
        end and the farthest retrieved document loses its head. Token 0 is always </s>: where the head is
        cut, </s> takes the first place again, so every block begins as a prompt does. A shorter sample
        leaves room, which becomes <pad>.
stream  The samples of all epochs are concatenated and cut every `length` tokens; a block may begin and end
        anywhere, and the last one of an epoch goes on into the next epoch: nothing is dropped.

Both are random access: `sources(numbers, growth)` needs no block but those asked for.
"""

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.samples import Lineup, Samples, shorten_document, turn_document

GROUP = 4096
"""Positions between two entries of the sparse prefix table of packing=stream."""
_GROUPS_KEPT, _TABLES_KEPT = 8, 8


@dataclass
class Source:
    """Unmasked tokens of one block."""

    tokens: np.ndarray
    """int64, at most `length` of them."""
    retrieved_spans: list[tuple[int, int]]
    """Where tokens of retrieved documents stand, with the <break> behind each document."""
    query_start: int
    """First token of the query document (packing=query); 0 under packing=stream."""
    documents: list[int]
    """Query documents with tokens in this block."""
    retrieved: list[int]
    """Retrieved documents with tokens in this block, by their number in the bank."""
    epoch: int
    """Epoch of the first token, from 0."""
    trimmed: int = 0
    """Tokens of the query's text that the block cannot hold."""


class QueryPacking:
    """One query document a block, at its end."""

    cut = "head"

    def __init__(self, samples: Samples, length: int) -> None:
        self.samples, self.length = samples, length
        self.vocabulary = samples.corpus.vocabulary

    @property
    def max_growth(self) -> int:
        """Tokens masking may add and still leave </s> text <break> picture </s> with one token of text."""
        return self.length - self.vocabulary.image_tokens - 4

    def sources(self, numbers: np.ndarray, growth: np.ndarray) -> list[Source]:
        """Sources of blocks `numbers` (int64); `growth` is how many tokens masking may add to each."""
        epochs = numbers // self.samples.count
        result = []
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            lineup = self.samples.line_up(epoch, numbers[chosen] - epoch * self.samples.count)
            for row, room in enumerate((self.length - growth[chosen]).tolist()):
                result.append(self._build(lineup, row, room, epoch))
        return result

    def _build(self, lineup: Lineup, row: int, room: int, epoch: int) -> Source:
        """Fill a buffer from its end: </s>, the query, then retrieved documents, nearest first."""
        vocabulary, samples = self.vocabulary, self.samples
        tokens = np.empty(self.length, np.int64)
        tokens[-1] = vocabulary.eos
        query = int(lineup.queries[row])
        whole = samples.corpus.read(query)
        ids = shorten_document(whole, room - 2, vocabulary)
        place = _put_before(
            tokens, self.length - 1, turn_document(ids, bool(lineup.query_image_first[row]), vocabulary)
        )
        query_start, used = place, []
        retrieved = lineup.retrieved[row].tolist()
        for column in range(len(retrieved) - 1, -1, -1):
            if retrieved[column] < 0:
                continue
            if place <= 1:  # place 0 is </s>'s
                break
            tokens[place - 1] = vocabulary.break_id
            image_first = bool(lineup.retrieved_image_first[row, column])
            pieces = turn_document(samples.bank.read(retrieved[column]), image_first, vocabulary)
            place = _put_before(tokens, place - 1, pieces)
            used.append(retrieved[column])
        first = max(0, place - 1)
        tokens[first] = vocabulary.eos
        spans = [(1, query_start - first)] if used else []
        trimmed = len(whole) - len(ids)
        return Source(tokens[first:], spans, query_start - first, [query], used[::-1], epoch, trimmed)


def _put_before(tokens: np.ndarray, end: int, pieces: list[np.ndarray]) -> int:
    """Write pieces so that they end before `end`, cutting what reaches below 0; returns their start."""
    for piece in reversed(pieces):
        start = max(0, end - len(piece))
        if end > start:
            tokens[start:end] = piece[len(piece) - (end - start) :]
        end = start
    return end


@dataclass
class _Group:
    """Up to GROUP consecutive samples of an epoch."""

    first: int
    """Token of the epoch at which the first sample begins."""
    starts: list[int]
    """Token of the epoch at which each sample begins, and the end of the last."""
    lineup: Lineup


class StreamPacking:
    """Samples concatenated over all epochs and cut every `length` tokens."""

    cut = "tail"

    def __init__(self, samples: Samples, length: int) -> None:
        self.samples, self.length = samples, length
        self.vocabulary = samples.corpus.vocabulary
        self._plain_tokens = int(samples.corpus.lengths.sum(dtype=np.int64)) + 2 * samples.count
        self.epoch_starts = [0]
        """Token of the whole stream at which each epoch begins, as far as it is known."""
        self._tables: OrderedDict[int, np.ndarray] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()

    @property
    def max_growth(self) -> int:
        """Tokens masking may add: one token of the source has to stay."""
        return self.length - 1

    def prepare(self, number: int) -> None:
        """Build the tables that block `number` needs; a loader calls it before its workers are forked."""
        epoch, _ = self._find_epoch(number * self.length)
        self._table(epoch)

    def sources(self, numbers: np.ndarray, growth: np.ndarray) -> list[Source]:
        """Sources of blocks `numbers` (int64); each has all `length` tokens, `growth` is not needed."""
        return [self._build(number) for number in numbers.tolist()]

    def _build(self, number: int) -> Source:
        tokens = np.empty(self.length, np.int64)
        epoch, token = self._find_epoch(number * self.length)
        source = Source(tokens, [], 0, [], [], epoch)
        place = 0
        while place < self.length:
            group = self._group(epoch, token)
            row = bisect_right(group.starts, token) - 1
            while place < self.length and row < len(group.starts) - 1:
                # A sample that began in an earlier block starts at a negative place.
                place = self._put_sample(source, group, row, place - (token - group.starts[row]))
                row += 1
                token = group.starts[row]
            if token == self._table(epoch)[-1]:
                epoch, token = epoch + 1, 0
        return source

    def _put_sample(self, source: Source, group: _Group, row: int, start: int) -> int:
        """Write the tokens of a sample that begins at place `start` (may be negative); returns its end."""
        vocabulary, samples, lineup = self.vocabulary, self.samples, group.lineup
        tokens = source.tokens
        start = _put(tokens, start, vocabulary.eos)
        retrieved = lineup.retrieved[row].tolist()
        retrieved_start = start
        for number, image_first in zip(retrieved, lineup.retrieved_image_first[row].tolist(), strict=True):
            if number < 0:
                continue
            end = start + int(samples.bank.lengths[number])
            if end >= 0 and start < self.length:
                if end > 0:
                    source.retrieved.append(number)
                    _put_pieces(tokens, start, turn_document(samples.bank.read(number), image_first, vocabulary))
                end = _put(tokens, end, vocabulary.break_id)
            else:
                end += 1
            start = end
        if start > max(retrieved_start, 0) and retrieved_start < self.length:
            source.retrieved_spans.append((max(retrieved_start, 0), min(start, self.length)))
        query = int(lineup.queries[row])
        end = start + int(samples.corpus.lengths[query])
        if end > 0 and start < self.length:
            source.documents.append(query)
            image_first = bool(lineup.query_image_first[row])
            _put_pieces(tokens, start, turn_document(samples.corpus.read(query), image_first, vocabulary))
        return _put(tokens, end, vocabulary.eos)

    def _find_epoch(self, token: int) -> tuple[int, int]:
        """Epoch in which a token of the whole stream stands, and its place within that epoch."""
        if not self.samples.documents:  # without retrieved documents every epoch is as long
            return divmod(token, self._plain_tokens)
        while token >= self.epoch_starts[-1]:
            self.epoch_starts.append(self.epoch_starts[-1] + int(self._table(len(self.epoch_starts) - 1)[-1]))
        epoch = bisect_right(self.epoch_starts, token) - 1
        return epoch, token - self.epoch_starts[epoch]

    def _table(self, epoch: int) -> np.ndarray:
        """Token at which every GROUP-th sample of an epoch begins, and the epoch's tokens; int64."""
        table = self._tables.get(epoch)
        if table is None:
            starts = range(0, self.samples.count, GROUP)
            totals = [self._group_lengths(epoch, start)[1].sum() for start in starts]
            table = self._tables[epoch] = np.cumsum([0, *totals], dtype=np.int64)
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        return table

    def _group_lengths(self, epoch: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, min(start + GROUP, self.samples.count))
        queries, retrieved = self.samples.choose(epoch, positions)
        return positions, self.samples.lengths(queries, retrieved)

    def _group(self, epoch: int, token: int) -> _Group:
        """The group that holds a token of an epoch."""
        table = self._table(epoch)
        index = int(np.searchsorted(table, token, "right")) - 1
        group = self._groups.get((epoch, index))
        if group is None:
            positions, lengths = self._group_lengths(epoch, index * GROUP)
            starts = (table[index] + np.cumsum(np.append(0, lengths))).tolist()
            group = _Group(starts[0], starts, self.samples.line_up(epoch, positions))
            self._groups[epoch, index] = group
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        return group


def _put(tokens: np.ndarray, place: int, token: int) -> int:
    """Write one token where its place is inside the block; returns the next place."""
    if 0 <= place < len(tokens):
        tokens[place] = token
    return place + 1


def _put_pieces(tokens: np.ndarray, place: int, pieces: list[np.ndarray]) -> None:
    """Write the part of consecutive pieces that is inside the block."""
    for piece in pieces:
        start, end = max(place, 0), min(place + len(piece), len(tokens))
        if start < end:
            tokens[start:end] = piece[start - place : end - place]
        place += len(piece)
