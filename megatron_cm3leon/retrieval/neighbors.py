"""The table of an index folder: what each document may retrieve from the memory bank, and its reader.

    neighbors.npy   int64 [documents, M], document numbers of the bank, best first; -1 where the bank holds too few
    scores.npy      float32 [documents, M], inner products with the whole query document, -inf beside -1

candidates.py says which they are. Reading a table needs neither FAISS nor an encoder.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.data.shards import MANIFEST, Corpus, hash_content, open_shards, sha256_file

FORMAT = 1
INDEX_FILE = "index.json"


@dataclass(kw_only=True)
class Neighbors:
    """The table of an index folder and the memory bank that its numbers mean."""

    table: np.ndarray
    """int64 [documents, M], memory-mapped; -1: none."""
    bank: Corpus


def manifest_sha256(corpus: Corpus) -> str:
    """What an index remembers of a shard folder: its content's hash; of an older one, the manifest's own."""
    if "content_sha256" in corpus.manifest:
        return hash_content(corpus.vocabulary.hash, corpus.shards)
    return sha256_file(corpus.folder / MANIFEST)


def load_neighbors(folder: str | Path, corpus: Corpus, bank_corpus: Corpus | None = None) -> Neighbors:
    """Open the table that tools/build_index.py made for `corpus`; its bank is found where it was, or given.

    Raises ValueError naming what differs when the index belongs to other shards, another bank or another
    vocabulary.
    """
    folder = Path(folder)
    description = load_description(folder)
    check_corpus(folder, description, corpus, "shards")
    if bank_corpus is None:
        same = description["bank_manifest_sha256"] == description["shards_manifest_sha256"]
        bank_corpus = corpus if same else open_bank(folder, description)
    check_corpus(folder, description, bank_corpus, "bank")
    try:
        table = np.load(folder / "neighbors.npy", mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{folder / 'neighbors.npy'} is unreadable ({error}); build it again: tools/build_index.py."
        ) from error
    expected = (corpus.documents, description["neighbors"])
    if table.shape != expected or table.dtype != np.int64:
        raise ValueError(
            f"{folder / 'neighbors.npy'} is {table.dtype} {list(table.shape)} instead of int64 {list(expected)}; "
            f"build it again with tools/build_index.py."
        )
    return Neighbors(table=table, bank=bank_corpus)


def load_description(folder: str | Path) -> dict:
    """Content of index.json, which is written last; ValueError when the folder holds no whole index."""
    path = Path(folder) / INDEX_FILE
    if not path.is_file():
        raise ValueError(
            f"no index at {folder}: it has no {INDEX_FILE}, which is written last. Run tools/build_index.py with "
            f"--output {folder} (again: it goes on where it stopped)."
        )
    try:
        description = json.loads(path.read_text())
        found = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no description of an index ({type(error).__name__}: {error}).") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}; this version reads format {FORMAT}. Build the index again.")
    return description


def open_bank(folder: Path, description: dict) -> Corpus:
    """Open the memory bank where the index recorded it: its absolute place, else relative to the index."""
    places = [Path(description["bank"]), Path(os.path.normpath(folder / description["bank_relative"]))]
    for place in places:
        if (place / MANIFEST).is_file():
            return open_shards(place)
    raise ValueError(
        f"the memory bank of the index at {folder} is neither at {places[0]} nor at {places[1]}; put the shards "
        f"back there, or build the index again with --bank where they are."
    )


def check_corpus(folder: Path, description: dict, corpus: Corpus, role: str) -> None:
    """Refuse a corpus that is not the `role` ("shards" or "bank") the index was built from."""
    if corpus.vocabulary.hash != description["vocabulary_hash"]:
        raise ValueError(
            f"the index at {folder} was built with vocabulary {description['vocabulary_hash']}, but the {role} at "
            f"{corpus.folder} have {corpus.vocabulary.hash}; build the index again from these shards."
        )
    expected, found = description[f"{role}_manifest_sha256"], manifest_sha256(corpus)
    if found != expected:
        raise ValueError(
            f"the index at {folder} was built from other {role}: {MANIFEST} of {description[role]} had sha256 "
            f"{expected[:16]}, that of {corpus.folder} has {found[:16]}. Use those shards, or build the index "
            f"again with tools/build_index.py."
        )
