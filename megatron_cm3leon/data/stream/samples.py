"""Samples: which documents a sample holds, in which order, and the order of text and image in each pair.

    </s> retrieved <break> ... <break> query </s>

The samples of a run are numbered from 0 without end. Each belongs to one source (mixture.py); sample k of a source
of N documents is at position k % N of that source's epoch k // N. Its query document is `permute(position)`. Its
retrieved documents are drawn from the query's row of the neighbor table; the most similar one comes last, next to the
query (CM3Leon section 2.1). Documents are numbered as in the ConcatCorpus of all sources and banks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_cm3leon.config.schema import SFTConfig
from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.data.stream.concat import ConcatCorpus
from megatron_cm3leon.data.stream.mixture import Mixture
from megatron_cm3leon.data.stream.order import derive_key, draw_bits, draw_integers, draw_uniform, permute
from megatron_cm3leon.data.stream.targets import MASKED, FormSampler
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary


@dataclass(frozen=True)
class SampleDocuments:
    """Documents of some samples."""

    epochs: np.ndarray
    """Epoch of each sample's source, int64 [samples]."""
    queries: np.ndarray
    """Numbers of the query documents, int64 [samples]."""
    retrieved: np.ndarray
    """Numbers of the retrieved documents, least similar first, int64 [samples, documents]; -1: none."""
    query_image_first: np.ndarray
    """Whether the image of the query comes first, bool [samples]."""
    retrieved_image_first: np.ndarray
    """The same for the retrieved documents, bool [samples, documents]."""
    query_forms: np.ndarray
    """Form of each query document (targets.py), int8 [samples]."""
    retrieved_forms: np.ndarray
    """The same of the retrieved documents, int8 [samples, documents]."""
    query_lengths: np.ndarray
    """Tokens of each query document in its form, int64 [samples]."""


class NeighborTable(Protocol):
    """What the stream uses of an index folder (data.neighbors.Neighbors)."""

    table: np.ndarray
    """int64 [documents, M], most similar first; -1: none."""
    bank: Corpus
    """Memory bank: the documents that the numbers of the table refer to."""

    def check(self, rows: np.ndarray) -> None:
        """ValueError if one of these rows (int64) is damaged."""


@dataclass
class DataSource:
    """A corpus of the training data."""

    corpus: Corpus
    neighbors: NeighborTable | None = None
    """Table of an index folder and its memory bank; None without retrieval."""
    weight: float = 1.0
    """Share of the samples, relative to the weights of the other sources."""


class Samples:
    """The samples of one or several sources."""

    def __init__(
        self, sources: list[DataSource], *, seed: int, documents: int = 0, choice: str = "fixed",
        image_first_probability: float = 0.5, sft: SFTConfig | None = None,
    ) -> None:  # fmt: skip
        """`documents` retrieved documents precede the query document, if its source has a neighbor table.

        `sft`: how documents with targets are used; None: as with the defaults.
        """
        self.seed = seed
        first = sources[0].corpus
        for source in sources[1:]:
            check_same_vocabulary(first.vocabulary, source.corpus.vocabulary, f"the shards at {source.corpus.folder}")
        banks = [source.neighbors.bank for source in sources if source.neighbors is not None and documents]
        self.corpus = ConcatCorpus([source.corpus for source in sources] + banks)
        self.sources = [
            SourceSamples(
                source, self.corpus, name, seed, documents, choice, image_first_probability, sft or SFTConfig()
            )
            for name, source in enumerate(sources)
        ]
        self.documents = max(source.documents for source in self.sources)
        self.mixture = Mixture([source.weight for source in sources])
        total = sum(source.count for source in self.sources)
        self.span = -(-total // self.mixture.length) * self.mixture.length
        """Samples per span (PrefixSums): an epoch, rounded up to complete cycles of the mixture."""
        self.has_targets = any(source.forms.targets is not None for source in self.sources)
        """Whether a query document has targets."""

    @property
    def repeats(self) -> bool:
        """Whether every span has the same documents of the same lengths, in a different order."""
        return len(self.sources) == 1 and not self.documents and self.sources[0].forms.is_constant

    def count_tokens(self) -> int:
        """Tokens of the samples of the first span."""
        if self.has_targets:
            return int(self.lengths(np.arange(self.span)).sum())
        return int(self.corpus.lengths.sum(dtype=np.int64)) + 2 * self.span

    def choose_documents(self, numbers: np.ndarray) -> SampleDocuments:
        """The documents of samples `numbers` (int64 [samples])."""
        shape = (len(numbers), self.documents)
        result = SampleDocuments(
            np.empty(len(numbers), np.int64),
            np.empty(len(numbers), np.int64),
            np.full(shape, -1),
            np.empty(len(numbers), bool),
            np.zeros(shape, bool),
            np.zeros(len(numbers), np.int8),
            np.zeros(shape, np.int8),
            np.empty(len(numbers), np.int64),
        )
        for source, epoch, positions, rows in self._parts(numbers):
            queries, retrieved = source.choose(epoch, positions)
            result.epochs[rows] = epoch
            result.queries[rows] = queries + source.first
            result.query_image_first[rows] = source.image_first(epoch, queries)
            result.query_forms[rows] = forms = source.forms.draw(epoch, queries)
            result.query_lengths[rows] = source.forms.measure(queries, forms)
            if source.documents:
                columns = slice(self.documents - source.documents, None)
                result.retrieved[rows, columns] = np.where(retrieved >= 0, retrieved + source.first_of_bank, -1)
                result.retrieved_image_first[rows, columns] = source.image_first(epoch, retrieved, of_bank=True)
                result.retrieved_forms[rows, columns] = source.bank_forms.without_change(retrieved)
        return result

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of complete samples `numbers`; int64 [samples]."""
        lengths = np.empty(len(numbers), np.int64)
        for source, epoch, positions, rows in self._parts(numbers):
            lengths[rows] = source.lengths(epoch, *source.choose(epoch, positions))
        return lengths

    def _parts(self, numbers: np.ndarray) -> "Iterator[tuple[SourceSamples, int, np.ndarray, np.ndarray | slice]]":
        """Source, epoch and positions of the samples, and their indices in `numbers`."""
        owners, local = self.mixture.split(numbers) if len(self.sources) > 1 else (None, numbers)
        for number, source in enumerate(self.sources):
            rows: np.ndarray | slice = slice(None) if owners is None else np.flatnonzero(owners == number)
            epochs, positions = np.divmod(local[rows], source.count)
            if not len(epochs):
                continue
            if epochs.min() == epochs.max():
                yield source, int(epochs[0]), positions, rows
                continue
            indices = np.arange(len(numbers))[rows]
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                yield source, epoch, positions[chosen], indices[chosen]


class SourceSamples:
    """The samples of one source; documents are numbered within its corpus or its bank."""

    def __init__(
        self, source: DataSource, concat: ConcatCorpus, number: int, seed: int, documents: int, choice: str,
        image_first_probability: float, sft: SFTConfig,
    ) -> None:  # fmt: skip
        self.corpus, self.seed, self.choice = source.corpus, seed, choice
        self.image_first_probability = image_first_probability
        self.documents = documents if source.neighbors is not None else 0
        self.neighbors = source.neighbors
        self.bank = source.neighbors.bank if source.neighbors and documents else source.corpus
        self.first, self.first_of_bank = concat.start_of(self.corpus), concat.start_of(self.bank)
        self.name = f"corpus {number}" if number else "corpus"
        same = self.bank is self.corpus  # within an epoch, a document has one order as query and as retrieved document
        self.bank_name = self.name if same else self.name.replace("corpus", "bank")
        self.forms = FormSampler(sft, self.corpus, seed, self.name)
        self.bank_forms = self.forms if same else FormSampler(sft, self.bank, seed, self.bank_name)
        if source.neighbors and documents:
            self._check_table(source.neighbors.table)

    def _check_table(self, table: np.ndarray) -> None:
        """ValueError if the neighbor table does not fit the corpus or has too few columns."""
        if len(table) != self.corpus.documents:
            raise ValueError(
                f"the neighbor table has {len(table)} rows, but the shards at {self.corpus.folder} have "
                f"{self.corpus.documents} documents; build the index again with tools/build_index.py."
            )
        if table.shape[1] < self.documents:
            raise ValueError(
                f"retrieval.documents ({self.documents}) exceeds the {table.shape[1]} neighbors per document in the "
                f"index; lower it, or build the index with more neighbors."
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
        """Retrieved documents of the queries in this epoch, [samples, documents], least similar first, -1 for none."""
        if not self.documents or self.neighbors is None:
            return np.empty((len(queries), 0), np.int64)
        self.neighbors.check(queries)
        rows = np.asarray(self.neighbors.table[queries])
        key = self._key("retrieved", self.name, epoch)
        keys = draw_bits(key, queries, np.arange(rows.shape[1])[:, None]) >> np.uint64(1)  # [columns, samples]
        keys[rows.T < 0] = np.iinfo(np.uint64).max  # chosen last
        wanted = np.full(len(queries), self.documents, np.uint8)
        if self.choice == "uniform":
            wanted = draw_integers(self._key("how many", self.name, epoch), self.documents + 1, queries)
        chosen = rank_random_keys(keys) < wanted
        # Columns are sorted by descending similarity: iterating backward gives the chosen ones least similar first.
        counts, retrieved = np.zeros(len(queries), np.int64), np.full((len(queries), self.documents), -1)
        for column in range(rows.shape[1] - 1, -1, -1):
            taken = np.flatnonzero(chosen[column])
            retrieved[taken, counts[taken]] = rows[taken, column]
            counts[taken] += 1
        return retrieved

    def lengths(self, epoch: int, queries: np.ndarray, retrieved: np.ndarray) -> np.ndarray:
        """Tokens of complete samples in this epoch, int64 [samples]."""
        forms = self.forms.draw(epoch, queries)
        lengths = self.forms.measure(queries, forms) + 2 - (forms == MASKED)
        for column in retrieved.T:
            lengths += np.where(column >= 0, self.bank.lengths[column].astype(np.int64) + 1, 0)
        return lengths

    def image_first(self, epoch: int, documents: np.ndarray, of_bank: bool = False) -> np.ndarray:
        """Whether the image comes first, for documents of the corpus or of the bank in this epoch; bool, same shape."""
        key = self._key("image first", self.bank_name if of_bank else self.name, epoch)
        return draw_uniform(key, documents.reshape(-1)).reshape(documents.shape) < self.image_first_probability

    def _key(self, purpose: str, source: str, epoch: int) -> int:
        return derive_key(self.seed, purpose, source, epoch)


def rank_random_keys(keys: np.ndarray) -> np.ndarray:
    """Rank of each key among the keys of its sample, ties broken by position; keys [columns, samples], ranks uint8."""
    ranks = np.zeros(keys.shape, np.uint8)
    for second in range(1, len(keys)):
        larger = keys[second] >= keys[:second]
        ranks[second] = larger.sum(0, dtype=np.uint8)
        ranks[:second] += ~larger
    return ranks


def order_modalities(ids: np.ndarray, image_first: bool, vocabulary: Vocabulary) -> list[np.ndarray]:
    """The document as pieces to concatenate; the two segments of a pair are swapped if `image_first` requires it."""
    breaks = (ids == vocabulary.break_id).nonzero()[0]
    if len(breaks) != 1:
        return [ids]
    middle = int(breaks[0])
    first_is_image = bool(middle and vocabulary.is_image(int(ids[0])))
    last_is_image = bool(middle + 1 < len(ids) and vocabulary.is_image(int(ids[-1])))
    if first_is_image in (last_is_image, image_first):
        return [ids]
    return [ids[middle + 1 :], ids[middle : middle + 1], ids[:middle]]


def shorten_document(ids: np.ndarray, room: int, vocabulary: Vocabulary) -> np.ndarray:
    """A document of at most `room` tokens: its longest texts lose their ends, its images lose nothing.

    At least one token of each text is kept; if that is still too long, the document loses its tail.
    """
    excess = len(ids) - room
    if excess <= 0:
        return ids
    keep = np.ones(len(ids), bool)
    breaks = np.flatnonzero(ids == vocabulary.break_id).tolist()
    segments = list(zip([0] + [position + 1 for position in breaks], [*breaks, len(ids)], strict=True))
    texts = [(start, end) for start, end in segments if end > start and vocabulary.is_text(int(ids[start]))]
    for start, end in sorted(texts, key=lambda text: text[0] - text[1]):
        n_trimmed = min(excess, end - start - 1)
        keep[end - n_trimmed : end] = False
        excess -= n_trimmed
    return ids[keep][:room]
