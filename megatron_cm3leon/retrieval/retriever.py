"""Retrieve documents for a text, an image or both, to put them in front of a prompt."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.data.neighbors import check_corpus, load_description, open_bank
from megatron_cm3leon.data.shards.reader import Corpus
from megatron_cm3leon.retrieval.encoder import Encoder, combine
from megatron_cm3leon.retrieval.filters import NO_NEIGHBOR, Bank, Queries, find_neighbors
from megatron_cm3leon.retrieval.index import load_index, search_index
from megatron_cm3leon.retrieval.part_arrays import load_array


class Retriever:
    """Searches the memory bank of an index folder with the filters of its table."""

    def __init__(self, folder: Path, description: dict, encoder: Encoder, bank: Corpus) -> None:
        self.folder, self.description, self.encoder, self.bank = folder, description, encoder, bank
        self.index = load_index(folder / "index.faiss", description["search"])
        vectors, identities = (load_array(folder / f"embeddings/{name}.npy") for name in ("bank", "bank_identities"))
        # Indexes of the first version hold one image per document: [documents, 2].
        self.data = Bank(vectors=vectors, identities=identities.reshape(len(identities), -1, 2))

    @classmethod
    def load(
        cls, folder: str | Path, encoder: str | Path | None = None, bank: Corpus | None = None, device: str = "cpu"
    ) -> "Retriever":
        """Open an index folder; `encoder` is the CLIP folder if it was moved since the index recorded its path.

        Raises ValueError if the encoder or the bank is not the one the index was built with.
        """
        folder = Path(folder)
        description = load_description(folder)
        bank = bank or open_bank(folder, description)
        check_corpus(folder, description, bank, "bank")
        loaded = Encoder.load(encoder or description["encoder"], device)
        if loaded.sha256 != description["encoder_sha256"]:
            raise ValueError(
                f"the index at {folder} was built with the encoder {description['encoder']} "
                f"({description['encoder_sha256'][:16]}), but {loaded.folder} is another one ({loaded.sha256[:16]}); "
                f"give the CLIP folder it was built with."
            )
        return cls(folder, description, loaded, bank)

    def search(
        self,
        texts: Sequence[str] | None = None,
        images: Sequence[Image.Image] | None = None,
        k: int = 2,
        bank_numbers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Numbers in the bank of the best k documents for each query, int64 [n, k], -1 if there are fewer.

        A query is a text, an RGB image, or both: `texts` and `images` have the same length then. `bank_numbers` are the
        numbers of queries that are themselves documents of the bank (-1: not one); these, and any document with their
        image, are not retrieved.
        """
        views = (
            None if texts is None else self.encoder.encode_texts(texts),
            None if images is None else self.encoder.encode_images(images),
        )
        vectors = combine(*views)
        numbers = np.full(len(vectors), NO_NEIGHBOR) if bank_numbers is None else np.asarray(bank_numbers, np.int64)
        identities = np.where(numbers[:, None, None] >= 0, self.data.identities[numbers.clip(0)], np.uint64(0))
        options = self.description["options"]
        neighbors, _ = find_neighbors(
            lambda part, count: search_index(self.index, part, count),
            self.data,
            Queries(
                vectors=vectors,
                identities=identities,
                bank_numbers=numbers,
                views=tuple(view for view in views if view is not None),
            ),
            k,
            threshold=options["threshold"],
            candidates=options["candidates"],
            max_candidates=options["max_candidates"],
        )
        return neighbors
