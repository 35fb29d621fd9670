"""Samples: which documents stand in a sequence, in which order, and which way round each pair is.

    </s> retrieved <break> ... <break> query </s>

The samples of a run are numbered from 0 without end. Each belongs to one source (mixture.py); sample k of a source
of N documents stands at position k % N of that source's epoch k // N. Its query document is `permute(position)`, its
retrieved documents are drawn from the query's row of the neighbour table, the most similar one last, beside the query.
Documents are numbered as in the library of all sources and banks.
"""

from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.data.stream.concat import Library
from megatron_cm3leon.data.stream.mixture import Mixture
from megatron_cm3leon.data.stream.order import derive_key, draw_bits, draw_integers, draw_uniform, permute
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary


@dataclass(frozen=True)
class Lineup:
    """Documents of some samples."""

    epochs: np.ndarray
    """Epoch of each sample's source, int64 [samples]."""
    queries: np.ndarray
    """Numbers of the query documents, int64 [samples]."""
    retrieved: np.ndarray
    """Numbers of the retrieved documents, farthest first, int64 [samples, documents]; -1 where there is none."""
    query_image_first: np.ndarray
    """Whether the picture of the pair comes first, bool [samples]."""
    retrieved_image_first: np.ndarray
    """The same of the retrieved documents, bool [samples, documents]."""


@dataclass
class DataSource:
    """A corpus of the training data."""

    corpus: Corpus
    neighbors: object | None = None
    """.table (int64 [corpus.documents, M], -1 = none, nearest first) and .bank (Corpus), where there is an index;
    .check(rows) refuses damaged ones."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources'."""


class Samples:
    """The samples of one or several sources."""

    def __init__(
        self, sources: list[DataSource], *, seed: int, documents: int = 0, choice: str = "fixed",
        image_first_probability: float = 0.5,
    ) -> None:  # fmt: skip
        """`documents` retrieved documents stand in front of the query of a source that has neighbours."""
        self.seed = seed
        first = sources[0].corpus
        for source in sources[1:]:
            check_same_vocabulary(first.vocabulary, source.corpus.vocabulary, f"the shards at {source.corpus.folder}")
        banks = [source.neighbors.bank for source in sources if source.neighbors is not None and documents]
        self.library = Library([source.corpus for source in sources] + banks)
        self.sources = [
            SourceSamples(source, self.library, name, seed, documents, choice, image_first_probability)
            for name, source in enumerate(sources)
        ]
        self.documents = max(source.documents for source in self.sources)
        self.mixture = Mixture([source.weight for source in sources])
        total = sum(source.count for source in self.sources)
        self.span = -(-total // self.mixture.length) * self.mixture.length
        """Samples after which tables of places begin anew: an epoch, or so many whole cycles of the mixture."""

    @property
    def repeats(self) -> bool:
        """Whether every span has the same documents, in another order."""
        return len(self.sources) == 1 and not self.documents

    def line_up(self, numbers: np.ndarray) -> Lineup:
        """The documents of samples `numbers`, int64 [samples]."""
        shape = (len(numbers), self.documents)
        result = Lineup(
            np.empty(len(numbers), np.int64),
            np.empty(len(numbers), np.int64),
            np.full(shape, -1),
            np.empty(len(numbers), bool),
            np.zeros(shape, bool),
        )
        for source, epoch, positions, rows in self._parts(numbers):
            queries, retrieved = source.choose(epoch, positions)
            result.epochs[rows] = epoch
            result.queries[rows] = queries + source.first
            result.query_image_first[rows] = source.image_first(epoch, queries)
            if source.documents:
                columns = slice(self.documents - source.documents, None)
                result.retrieved[rows, columns] = np.where(retrieved >= 0, retrieved + source.first_of_bank, -1)
                result.retrieved_image_first[rows, columns] = source.image_first(epoch, retrieved, of_bank=True)
        return result

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of whole samples `numbers`, int64."""
        lengths = np.empty(len(numbers), np.int64)
        for source, epoch, positions, rows in self._parts(numbers):
            lengths[rows] = source.lengths(*source.choose(epoch, positions))
        return lengths

    def _parts(self, numbers: np.ndarray):
        """Source, epoch and positions of samples, and which of `numbers` they are."""
        owners, own = self.mixture.split(numbers) if len(self.sources) > 1 else (None, numbers)
        for number, source in enumerate(self.sources):
            rows = slice(None) if owners is None else np.flatnonzero(owners == number)
            epochs, positions = np.divmod(own[rows], source.count)
            if not len(epochs):
                continue
            if epochs.min() == epochs.max():
                yield source, int(epochs[0]), positions, rows
                continue
            places = np.arange(len(numbers))[rows]
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                yield source, epoch, positions[chosen], places[chosen]


class SourceSamples:
    """The samples of one source; documents are numbered as in its own corpus and bank."""

    def __init__(
        self, source: DataSource, library: Library, number: int, seed: int, documents: int, choice: str,
        image_first_probability: float,
    ) -> None:  # fmt: skip
        self.corpus, self.seed, self.choice = source.corpus, seed, choice
        self.image_first_probability = image_first_probability
        self.documents = documents if source.neighbors is not None else 0
        self.neighbors = source.neighbors
        self.table = source.neighbors.table if self.documents else None
        self.bank = source.neighbors.bank if self.documents else source.corpus
        self.first, self.first_of_bank = library.start_of(self.corpus), library.start_of(self.bank)
        self.name = f"corpus {number}" if number else "corpus"
        own = self.bank is self.corpus  # a document keeps its direction within an epoch, wherever it stands
        self.bank_name = self.name if own else self.name.replace("corpus", "bank")
        if self.documents and len(self.table) != self.corpus.documents:
            raise ValueError(
                f"the neighbour table has {len(self.table)} rows, the shards at {self.corpus.folder} have "
                f"{self.corpus.documents} documents; build the index again with tools/build_index.py."
            )
        if self.documents and self.table.shape[1] < self.documents:
            raise ValueError(
                f"retrieval.documents ({self.documents}) exceeds the {self.table.shape[1]} neighbours a document "
                f"has in the index; lower it, or build the index with more neighbours."
            )

    @property
    def count(self) -> int:
        """Samples in an epoch: every document is the query of one."""
        return self.corpus.documents

    def choose(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query documents [samples] and retrieved documents [samples, documents] at `positions` of an epoch."""
        queries = permute(positions, self.count, self._key("order", self.name, epoch))
        return queries, self.choose_retrieved(epoch, queries)

    def choose_retrieved(self, epoch: int, queries: np.ndarray) -> np.ndarray:
        """Retrieved documents of the queries in this epoch, [samples, documents], farthest first, -1 for none."""
        if not self.documents:
            return np.empty((len(queries), 0), np.int64)
        self.neighbors.check(queries)
        rows = np.asarray(self.table[queries])
        key = self._key("retrieved", self.name, epoch)
        lots = draw_bits(key, queries, np.arange(rows.shape[1])[:, None]) >> np.uint64(1)  # [columns, samples]
        lots[rows.T < 0] = np.iinfo(np.uint64).max  # drawn last
        wanted = np.full(len(queries), self.documents, np.uint8)
        if self.choice == "uniform":
            wanted = draw_integers(self._key("how many", self.name, epoch), self.documents + 1, queries)
        chosen = rank_columns(lots) < wanted
        # Columns are sorted, nearest first: from the last column on, the chosen ones are farthest first.
        places, retrieved = np.zeros(len(queries), np.int64), np.full((len(queries), self.documents), -1)
        for column in range(rows.shape[1] - 1, -1, -1):
            taken = np.flatnonzero(chosen[column])
            retrieved[taken, places[taken]] = rows[taken, column]
            places[taken] += 1
        return retrieved

    def lengths(self, queries: np.ndarray, retrieved: np.ndarray) -> np.ndarray:
        """Tokens of whole samples, int64."""
        lengths = self.corpus.lengths[queries].astype(np.int64) + 2
        for column in retrieved.T:
            lengths += np.where(column >= 0, self.bank.lengths[column].astype(np.int64) + 1, 0)
        return lengths

    def image_first(self, epoch: int, documents: np.ndarray, of_bank: bool = False) -> np.ndarray:
        """Which way round documents of the corpus, or of the bank, stand in this epoch."""
        key = self._key("image first", self.bank_name if of_bank else self.name, epoch)
        return draw_uniform(key, documents.reshape(-1)).reshape(documents.shape) < self.image_first_probability

    def _key(self, purpose: str, source: str, epoch: int) -> int:
        return derive_key(self.seed, purpose, source, epoch)


def rank_columns(lots: np.ndarray) -> np.ndarray:
    """Of each lot [columns, n], how many of its n-th column's are smaller (of equals: stand before it); uint8."""
    ranks = np.zeros(lots.shape, np.uint8)
    for second in range(1, len(lots)):
        behind = lots[second] >= lots[:second]
        ranks[second] = behind.sum(0, dtype=np.uint8)
        ranks[:second] += ~behind
    return ranks


def turn_document(ids: np.ndarray, image_first: bool, vocabulary: Vocabulary) -> list[np.ndarray]:
    """The document as pieces to concatenate; a pair is turned round where `image_first` asks for it."""
    breaks = (ids == vocabulary.break_id).nonzero()[0]
    if len(breaks) != 1:
        return [ids]
    place = int(breaks[0])
    first_is_image = bool(place and vocabulary.is_image(int(ids[0])))
    last_is_image = bool(place + 1 < len(ids) and vocabulary.is_image(int(ids[-1])))
    if first_is_image in (last_is_image, image_first):
        return [ids]
    return [ids[place + 1 :], ids[place : place + 1], ids[:place]]


def shorten_document(ids: np.ndarray, room: int, vocabulary: Vocabulary) -> np.ndarray:
    """A document of at most `room` tokens: its longest texts lose their ends, its pictures nothing.

    One token of each text stays while that is enough; only a document whose pictures alone exceed the
    room loses its own tail.
    """
    excess = len(ids) - room
    if excess <= 0:
        return ids
    keep = np.ones(len(ids), bool)
    breaks = np.flatnonzero(ids == vocabulary.break_id).tolist()
    segments = list(zip([0] + [place + 1 for place in breaks], [*breaks, len(ids)], strict=True))
    texts = [(start, end) for start, end in segments if end > start and vocabulary.is_text(int(ids[start]))]
    for start, end in sorted(texts, key=lambda text: text[0] - text[1]):
        gone = min(excess, end - start - 1)
        keep[end - gone : end] = False
        excess -= gone
    return ids[keep][:room]
