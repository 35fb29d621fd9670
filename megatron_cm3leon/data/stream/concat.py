"""ConcatCorpus: the documents of several corpora under one numbering, read many at a time.

The corpora follow one another, each once: document n of corpus c has the number `start_of(c) + n`.
"""

from collections.abc import Iterator

import numpy as np

from megatron_cm3leon.data.shards.reader import Corpus


class ConcatCorpus:
    """Documents of the sources and of their memory banks."""

    def __init__(self, corpora: list[Corpus]) -> None:
        """A corpus may be given twice, as a source that is its own bank. All must have the same vocabulary."""
        self.corpora = list({id(corpus): corpus for corpus in corpora}.values())
        self.vocabulary = self.corpora[0].vocabulary
        self.starts = np.cumsum([0] + [corpus.documents for corpus in self.corpora])
        single = len(self.corpora) == 1
        self.lengths = (
            self.corpora[0].lengths if single else np.concatenate([corpus.lengths for corpus in self.corpora])
        )
        """Tokens of each document, uint32."""

    def start_of(self, corpus: Corpus) -> int:
        """Number of the first document of a corpus."""
        return int(self.starts[[id(each) for each in self.corpora].index(id(corpus))])

    def locate(self, number: int) -> tuple[Corpus, int]:
        """The corpus of a document, and its number in that corpus."""
        index = int(np.searchsorted(self.starts, number, "right")) - 1
        return self.corpora[index], number - int(self.starts[index])

    def read(self, number: int) -> np.ndarray:
        """Ids of one document, as Corpus.read."""
        corpus, local = self.locate(number)
        return corpus.read(local)

    def read_many(self, numbers: np.ndarray) -> np.ndarray:
        """Ids of documents, concatenated, as Corpus.read_into."""
        lengths = self.lengths[numbers].astype(np.int64)
        ends = np.cumsum(lengths)
        out = np.empty(ends[-1], self.vocabulary.dtype)
        for corpus, rows, local in self._by_corpus(numbers):
            corpus.read_into(local, out, (ends - lengths)[rows])
        return out

    def targets(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Targets of documents, as Corpus.targets."""
        found: list[np.ndarray] = [np.empty((0, 2), np.int64)] * len(numbers)
        for corpus, rows, local in self._by_corpus(numbers):
            for row, ranges in zip(np.arange(len(numbers))[rows].tolist(), corpus.targets(local), strict=True):
                found[row] = ranges
        return found

    def prefetch(self, numbers: np.ndarray) -> None:
        """Let the kernel read documents ahead, as Corpus.prefetch."""
        for corpus, _, local in self._by_corpus(numbers):
            corpus.prefetch(local)

    def _by_corpus(self, numbers: np.ndarray) -> Iterator[tuple[Corpus, np.ndarray | slice, np.ndarray]]:
        """Each corpus, the indices in `numbers` of its documents, and their numbers within the corpus."""
        if len(self.corpora) == 1:
            yield self.corpora[0], slice(None), numbers
            return
        owners = np.searchsorted(self.starts, numbers, "right") - 1
        for owner in np.unique(owners).tolist():
            rows = np.flatnonzero(owners == owner)
            yield self.corpora[owner], rows, numbers[rows] - self.starts[owner]
