"""Samples: which documents stand in a sequence, in which order, and which way round each pair is.

    </s> retrieved <break> ... <break> query </s>

Position p of an epoch is one sample: its query document is `permute(p)`, its retrieved documents are
drawn from the query's row of the neighbour table, the most similar one last, beside the query.
"""

from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.order import derive_key, draw_bits, draw_integers, draw_uniform, permute
from megatron_cm3leon.data.shards import Corpus
from megatron_cm3leon.tokenizers.vocab import Vocabulary


@dataclass(frozen=True)
class Lineup:
    """Documents of some samples."""

    queries: np.ndarray
    """Numbers of the query documents, int64 [samples]."""
    retrieved: np.ndarray
    """Numbers in the bank, farthest first, int64 [samples, documents]; -1 where there is none."""
    query_image_first: np.ndarray
    """Whether the picture of the pair comes first, bool [samples]."""
    retrieved_image_first: np.ndarray
    """The same of the retrieved documents, bool [samples, documents]."""


class Samples:
    """The samples of a corpus and, where `neighbors` is given, of its memory bank."""

    def __init__(
        self, corpus: Corpus, neighbors=None, *, seed: int, documents: int = 0, choice: str = "fixed",
        image_first_probability: float = 0.5,
    ) -> None:  # fmt: skip
        """`neighbors` has .table (int64 [corpus.documents, M], -1 = none) and .bank (Corpus)."""
        self.corpus, self.seed, self.choice = corpus, seed, choice
        self.image_first_probability = image_first_probability
        self.documents = documents if neighbors is not None else 0
        self.table = neighbors.table if self.documents else None
        self.bank = neighbors.bank if self.documents else corpus
        if self.documents and len(self.table) != corpus.documents:
            raise ValueError(
                f"the neighbour table has {len(self.table)} rows, the shards at {corpus.folder} have "
                f"{corpus.documents} documents; build the index again with tools/build_index.py."
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

    def line_up(self, epoch: int, positions: np.ndarray) -> Lineup:
        """The documents at `positions` of an epoch."""
        queries, retrieved = self.choose(epoch, positions)
        # A document keeps its direction within an epoch, wherever it stands.
        bank = "corpus" if self.bank is self.corpus else "bank"
        return Lineup(
            queries,
            retrieved,
            self._image_first("corpus", epoch, queries),
            self._image_first(bank, epoch, retrieved),
        )

    def choose(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query documents [samples] and retrieved documents [samples, documents] at `positions`."""
        queries = permute(positions, self.count, self._key("order", "corpus", epoch))
        return queries, self.choose_retrieved(epoch, queries)

    def choose_retrieved(self, epoch: int, queries: np.ndarray) -> np.ndarray:
        """Retrieved documents of the queries in this epoch, [samples, documents], as Lineup has them."""
        if not self.documents:
            return np.empty((len(queries), 0), np.int64)
        rows = np.asarray(self.table[queries])
        key = self._key("retrieved", "corpus", epoch)
        lots = draw_bits(key, queries[:, None], np.arange(rows.shape[1])) >> np.uint64(1)
        lots[rows < 0] = np.iinfo(np.uint64).max  # drawn last
        ranks = np.argpartition(lots, self.documents - 1, axis=1)[:, : self.documents]
        wanted = np.full(len(queries), self.documents)
        if self.choice == "uniform":
            ranks = np.take_along_axis(ranks, np.argsort(np.take_along_axis(lots, ranks, 1), axis=1), 1)
            wanted = draw_integers(self._key("how many", "corpus", epoch), self.documents + 1, queries)
            ranks = np.where(np.arange(self.documents) < wanted[:, None], ranks, -1)
        ranks = -np.sort(-ranks, axis=1)  # table rows are sorted, nearest first: farthest to the front
        return np.where(ranks >= 0, np.take_along_axis(rows, np.maximum(ranks, 0), 1), -1)

    def lengths(self, queries: np.ndarray, retrieved: np.ndarray) -> np.ndarray:
        """Tokens of whole samples, int64."""
        lengths = self.corpus.lengths[queries].astype(np.int64) + 2
        if retrieved.shape[1]:
            lengths += np.where(retrieved >= 0, self.bank.lengths[retrieved].astype(np.int64) + 1, 0).sum(1)
        return lengths

    def _image_first(self, source: str, epoch: int, documents: np.ndarray) -> np.ndarray:
        key = self._key("image first", source, epoch)
        return draw_uniform(key, documents.reshape(-1)).reshape(documents.shape) < self.image_first_probability

    def _key(self, purpose: str, source: str, epoch: int) -> int:
        return derive_key(self.seed, purpose, source, epoch)


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
