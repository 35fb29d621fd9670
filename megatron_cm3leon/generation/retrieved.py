"""Retrieved documents for prompts: search an index by text or picture, read the documents from its bank."""

from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary


def keep_nearest(documents: list, needed: int, context: int) -> list:
    """The last (most similar) documents that fit in front of `needed` tokens, as query packing keeps them."""
    kept = list(documents)
    while kept and 1 + sum(len(one) + 1 for one in kept) + needed > context:
        del kept[0]
    return kept


class DocumentSource:
    """An index and its memory bank, as generation uses them."""

    def __init__(self, retriever) -> None:
        """`retriever` has .search(texts=, images=, k=) -> numbers [n, k] and .bank."""
        self.retriever, self.bank = retriever, retriever.bank

    @classmethod
    def load(
        cls, folder: str | Path, vocabulary: Vocabulary, encoder: str | Path | None = None, device: str = "cpu"
    ) -> "DocumentSource":
        """Open what tools/build_index.py wrote; ValueError where its documents are of another vocabulary."""
        from megatron_cm3leon.retrieval.retriever import Retriever

        retriever = Retriever.load(folder, encoder, device=device)
        check_same_vocabulary(vocabulary, retriever.bank.vocabulary, f"the memory bank of {folder}")
        return cls(retriever)

    def find(
        self, count: int, texts: list[str] | None = None, pictures: list[Image.Image] | None = None
    ) -> list[list[int]]:
        """Numbers in the bank of at most `count` documents for each query, the most similar last."""
        if count < 1:
            raise ValueError(f"documents ({count}) must be at least 1 to retrieve any.")
        table = self.retriever.search(texts=texts, images=pictures, k=count)
        return [[int(number) for number in row[::-1] if number >= 0] for row in table]

    def read(self, numbers: list[list[int]]) -> list[list[np.ndarray]]:
        """The documents' ids as stored: text <break> picture."""
        return [[self.bank.read(number) for number in row] for row in numbers]
