"""Which documents of the memory bank each document may retrieve: the filters, the table, its reader.

The filters are the paper's (CM3Leon section 2.1): going through the candidates by falling score, one is kept
when its score to the query and to every kept one is at most `threshold` (0.9), when it is not the query
document itself, and when its picture is neither the query's nor a kept one's. A document keeps M neighbours
or, where the bank holds too few, fewer: the rest of its row is -1.

    neighbors.npy   int64 [documents, M], document numbers of the bank, best first
    scores.npy      float32 [documents, M], inner products of unit vectors, -inf beside -1

Reading a table needs neither FAISS nor an encoder.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.data.shards import MANIFEST, Corpus, hash_content, open_shards, sha256_file

FORMAT = 1
INDEX_FILE = "index.json"
NO_NEIGHBOR = -1
_CANDIDATE_BYTES = 64 << 20
"""Candidate vectors that are held in memory at a time."""
_GROWTH = 4


@dataclass(kw_only=True)
class Bank:
    """What the filters need of the memory bank."""

    vectors: np.ndarray
    """Unit vectors [documents, width], float16 or float32; may be a memory map."""
    identities: np.ndarray
    """uint64 [documents, 2]: hashes of the picture file and of the image tokens; 0 where there is none."""


@dataclass(kw_only=True)
class Queries:
    """Query documents, row by row."""

    vectors: np.ndarray
    """Unit vectors [n, width]."""
    identities: np.ndarray
    """uint64 [n, 2], as in Bank; zeros where the picture is not known."""
    own: np.ndarray
    """int64 [n]: the query's own number in the bank, -1 when it is not in it."""

    def rows(self, chosen) -> "Queries":
        """The queries of these rows."""
        return Queries(vectors=self.vectors[chosen], identities=self.identities[chosen], own=self.own[chosen])


def find_neighbors(
    search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    bank: Bank,
    queries: Queries,
    count: int,
    *,
    threshold: float = 0.9,
    candidates: int = 64,
    max_candidates: int = 4096,
) -> tuple[np.ndarray, np.ndarray]:
    """Table int64 and scores float32 [n, count] of the neighbours of `queries`.

    `search(vectors, k)` returns (scores, numbers) of the best k of the bank. It is asked for `candidates`, and
    for four times as many, up to `max_candidates`, where those left fewer than `count` after the filters.
    """
    largest = min(max_candidates, len(bank.vectors))
    wanted = min(max(candidates, count + 1), largest)
    table = np.full((len(queries.vectors), count), NO_NEIGHBOR, np.int64)
    scores = np.full(table.shape, -np.inf, np.float32)
    open_rows = np.arange(len(table))
    while len(open_rows):
        rows_at_once = max(1, _CANDIDATE_BYTES // (wanted * bank.vectors.shape[1] * 4))
        for start in range(0, len(open_rows), rows_at_once):
            rows = open_rows[start : start + rows_at_once]
            part = queries.rows(rows)
            _, numbers = search(np.asarray(part.vectors, np.float32), wanted)
            table[rows], scores[rows] = filter_candidates(bank, part, numbers, count, threshold)
        open_rows = open_rows[table[open_rows, -1] == NO_NEIGHBOR]
        if wanted == largest:
            break
        wanted = min(wanted * _GROWTH, largest)
    return table, scores


def filter_candidates(
    bank: Bank, queries: Queries, candidates: np.ndarray, count: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the filters to candidates int64 [n, k] (-1: none): table and scores [n, count].

    Scores are computed again from the vectors, so that an index that approximates them changes nothing but
    which candidates there are; equal scores are ordered by document number.
    """
    queries_nd = np.asarray(queries.vectors, np.float32)
    vectors_nkd = np.asarray(bank.vectors[candidates.clip(0)], np.float32)
    scores_nk = np.matmul(vectors_nkd, queries_nd[:, :, None])[:, :, 0]
    identities_nk2 = bank.identities[candidates.clip(0)]
    allowed_nk = (candidates != NO_NEIGHBOR) & (scores_nk <= threshold) & (candidates != queries.own[:, None])
    allowed_nk &= ~_same_picture(identities_nk2, queries.identities[:, None])
    order_nk = np.lexsort((candidates, -scores_nk), axis=-1)
    rank_nk = np.empty_like(order_nk)
    np.put_along_axis(rank_nk, order_nk, np.arange(order_nk.shape[1])[None], axis=1)

    rows = np.arange(len(candidates))
    table = np.full((len(rows), count), NO_NEIGHBOR, np.int64)
    scores = np.full(table.shape, -np.inf, np.float32)
    for place in range(count):
        if not allowed_nk.any():
            break
        best = np.where(allowed_nk, rank_nk, rank_nk.shape[1]).argmin(axis=1)
        found = allowed_nk[rows, best]
        table[found, place] = candidates[rows, best][found]
        scores[found, place] = scores_nk[rows, best][found]
        alike_nk = np.matmul(vectors_nkd, vectors_nkd[rows, best][:, :, None])[:, :, 0] > threshold
        alike_nk |= _same_picture(identities_nk2, identities_nk2[rows, best][:, None])
        alike_nk[rows, best] = True
        allowed_nk &= ~alike_nk
    return table, scores


def _same_picture(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Do two arrays of identities [..., 2] agree in the picture file or in the image tokens?"""
    return ((left == right) & (left != 0)).any(axis=-1)


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
