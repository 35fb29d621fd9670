"""Retrieved documents for prompts: given ones, or found in an index by text or image and read from its memory bank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megatron_cm3leon.generation.codec import Codec
from megatron_cm3leon.tokenizers.images import load_image
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

if TYPE_CHECKING:
    from megatron_cm3leon.retrieval.retriever import Retriever


def keep_nearest(documents: Sequence, needed: int, context: int) -> list:
    """The last (most similar) documents that fit in front of `needed` tokens, as packing=query keeps them."""
    kept = list(documents)
    while kept and 1 + sum(len(one) + 1 for one in kept) + needed > context:
        del kept[0]
    return kept


class DocumentSource:
    """An index and its memory bank."""

    def __init__(self, retriever: "Retriever") -> None:
        self.retriever, self.bank = retriever, retriever.bank

    @classmethod
    def load(
        cls, folder: str | Path, vocabulary: Vocabulary, encoder: str | Path | None = None, device: str = "cpu"
    ) -> "DocumentSource":
        """Load what tools/build_index.py wrote; ValueError if its documents have another vocabulary."""
        from megatron_cm3leon.retrieval.retriever import Retriever  # imports FAISS and transformers

        retriever = Retriever.load(folder, encoder, device=device)
        check_same_vocabulary(vocabulary, retriever.bank.vocabulary, f"the memory bank of {folder}")
        return cls(retriever)

    def find(
        self, count: int, texts: list[str] | None = None, images: list[Image.Image] | None = None
    ) -> list[list[int]]:
        """Numbers in the bank of at most `count` documents for each query, the most similar last."""
        if count < 1:
            raise ValueError(f"documents ({count}) must be at least 1 to retrieve any.")
        table = self.retriever.search(texts=texts, images=images, k=count)
        return [[int(number) for number in row[::-1] if number >= 0] for row in table]

    def read(self, numbers: list[list[int]]) -> list[list[np.ndarray]]:
        """Ids of the documents, as stored: text <break> image."""
        return [[self.bank.read(number) for number in row] for row in numbers]


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Where the retrieved documents of prompts come from; by default there are none."""

    index: str | None = None
    """Index folder to search."""
    documents: int | None = None
    """Documents to retrieve for each prompt; as many as in training by default."""
    encoder: str | None = None
    """CLIP folder, if it was moved since the index recorded its path."""
    given: Sequence[tuple[str, str]] = field(default=())
    """(caption, image file) of documents in front of each prompt, the most similar last, instead of an index."""

    def __post_init__(self) -> None:
        if self.given and self.index:
            raise ValueError("give either --document or --retrieve.")
        if not self.given and not self.index and (self.documents is not None or self.encoder is not None):
            raise ValueError("--documents and --encoder are for --retrieve INDEX; give it as well, or neither of them.")


@dataclass(frozen=True)
class Queries:
    """What documents are retrieved by: one text or one image per prompt."""

    texts: list[str] | None = None
    images: list[Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.texts if self.texts is not None else self.images or [])


@dataclass(frozen=True)
class Retrieved:
    """Retrieved documents of each prompt; both None without any."""

    documents: Sequence[Sequence[Sequence[int] | np.ndarray]] | None = None
    """Ids."""
    numbers: list[list[int]] | None = None
    """Numbers in the bank; None for given documents."""

    def describe(self, entry: dict, prompt: int) -> dict:
        """An entry of generated.json, with the numbers of this prompt's documents."""
        return entry if self.numbers is None else entry | {"retrieved": self.numbers[prompt]}


def retrieve_documents(options: RetrievalOptions, codec: Codec, default_count: int, queries: Queries) -> Retrieved:
    """Documents in front of each prompt; `default_count` of them unless the options say how many."""
    if options.given:
        given = [codec.encode_document([caption, load_image(path)]) for caption, path in options.given]
        return Retrieved([given] * len(queries))
    if not options.index:
        return Retrieved()
    source = DocumentSource.load(options.index, codec.vocabulary, options.encoder)
    count = default_count if options.documents is None else options.documents
    numbers = source.find(count, texts=queries.texts, images=queries.images)
    return Retrieved(source.read(numbers), numbers)
