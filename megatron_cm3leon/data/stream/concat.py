"""Library: the documents of several corpora under one numbering, read many at a time.

The corpora stand one after another, each once: document n of corpus c has the number `start_of(c) + n`.
"""

import numpy as np

from megatron_cm3leon.data.shards.reader import Corpus


class Library:
    """Documents of the sources and of their memory banks."""

    def __init__(self, corpora: list[Corpus]) -> None:
        """One corpus may be named twice, as a source that is its own bank; all share one vocabulary."""
        self.corpora = list({id(corpus): corpus for corpus in corpora}.values())
        self.vocabulary = self.corpora[0].vocabulary
        self.starts = np.cumsum([0] + [corpus.documents for corpus in self.corpora])
        alone = len(self.corpora) == 1
        self.lengths = self.corpora[0].lengths if alone else np.concatenate([corpus.lengths for corpus in self.corpora])
        """Tokens of each document, uint32."""

    def start_of(self, corpus: Corpus) -> int:
        """Number of a corpus's first document."""
        return int(self.starts[[id(each) for each in self.corpora].index(id(corpus))])

    def locate(self, number: int) -> tuple[Corpus, int]:
        """The corpus of a document and its number there."""
        place = int(np.searchsorted(self.starts, number, "right")) - 1
        return self.corpora[place], number - int(self.starts[place])

    def read(self, number: int) -> np.ndarray:
        """Ids of one document, as Corpus.read."""
        corpus, own = self.locate(number)
        return corpus.read(own)

    def read_many(self, numbers: np.ndarray) -> np.ndarray:
        """Ids of documents, one behind the other, as Corpus.read_into."""
        lengths = self.lengths[numbers].astype(np.int64)
        ends = np.cumsum(lengths)
        out = np.empty(ends[-1], self.vocabulary.dtype)
        for corpus, rows, own in self._by_corpus(numbers):
            corpus.read_into(own, out, (ends - lengths)[rows])
        return out

    def prefetch(self, numbers: np.ndarray) -> None:
        """Ask for documents that will be read soon, as Corpus.prefetch."""
        for corpus, _, own in self._by_corpus(numbers):
            corpus.prefetch(own)

    def _by_corpus(self, numbers: np.ndarray):
        """Each corpus with its places in `numbers` and its own numbers of those documents."""
        if len(self.corpora) == 1:
            yield self.corpora[0], slice(None), numbers
            return
        places = np.searchsorted(self.starts, numbers, "right") - 1
        for place in np.unique(places).tolist():
            rows = np.flatnonzero(places == place)
            yield self.corpora[place], rows, numbers[rows] - self.starts[place]
