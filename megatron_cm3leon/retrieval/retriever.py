"""Retrieve documents for a text, a picture or both: what generation puts in front of a prompt."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.data.neighbors import check_corpus, load_description, open_bank
from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.retrieval.encoder import Encoder, combine
from megatron_cm3leon.retrieval.filters import NO_NEIGHBOR, Bank, Queries, find_neighbors
from megatron_cm3leon.retrieval.index import load_index, search_index
from megatron_cm3leon.retrieval.part_arrays import load_rows


class Retriever:
    """Searches the memory bank of an index folder with the filters of its table."""

    def __init__(self, folder: Path, description: dict, encoder: Encoder, bank: Corpus) -> None:
        self.folder, self.description, self.encoder, self.bank = folder, description, encoder, bank
        self.index = load_index(folder / "index.faiss", description["search"])
        vectors, identities = (load_rows(folder / f"embeddings/{name}.npy") for name in ("bank", "bank_identities"))
        # Indexes of the first version know one picture a document: [documents, 2].
        self.data = Bank(vectors=vectors, identities=identities.reshape(len(identities), -1, 2))

    @classmethod
    def load(
        cls, folder: str | Path, encoder: str | Path | None = None, bank: Corpus | None = None, device: str = "cpu"
    ) -> "Retriever":
        """Open an index folder; `encoder` is the CLIP folder if it was moved since the index recorded its path.

        Raises ValueError when the encoder or the bank is not the one the index was built with.
        """
        folder = Path(folder)
        description = load_description(folder)
        bank = bank or open_bank(folder, description)
        check_corpus(folder, description, bank, "bank")
        loaded = Encoder.load(encoder or description["encoder"], device)
        if loaded.sha256 != description["encoder_sha256"]:
            raise ValueError(
                f"the index at {folder} was built with the encoder {description['encoder']} "
                f"({description['encoder_sha256'][:16]}), but {loaded.folder} is another one ({loaded.sha256[:16]})."
            )
        return cls(folder, description, loaded, bank)

    def search(
        self,
        texts: Sequence[str] | None = None,
        pictures: Sequence[Image.Image] | None = None,
        k: int = 2,
        own: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Numbers in the bank of the best k documents for each query, int64 [n, k], -1 where there are fewer.

        A query is a text, an RGB picture, or both at the same place. `own` are the numbers of queries that are
        themselves documents of the bank; these, and any document with their picture, are left out.
        """
        views = (
            None if texts is None else self.encoder.encode_texts(texts),
            None if pictures is None else self.encoder.encode_pictures(pictures),
        )
        vectors = combine(*views)
        numbers = np.full(len(vectors), NO_NEIGHBOR) if own is None else np.asarray(own, np.int64)
        identities = np.where(numbers[:, None, None] >= 0, self.data.identities[numbers.clip(0)], np.uint64(0))
        options = self.description["options"]
        table, _ = find_neighbors(
            lambda part, count: search_index(self.index, part, count),
            self.data,
            Queries(
                vectors=vectors,
                identities=identities,
                own=numbers,
                views=tuple(view for view in views if view is not None),
            ),
            k,
            threshold=options["threshold"],
            candidates=options["candidates"],
            max_candidates=options["max_candidates"],
        )
        return table
