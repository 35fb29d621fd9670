"""The neighbor table of an index folder: the documents of the memory bank that each document may retrieve.

    neighbors.npy         int64 [documents, M], document numbers of the bank, best first; -1 if the bank holds too few
    neighbors.crc32.npy   uint32, checksums of the table
    scores.npy            float32 [documents, M], inner products with the complete query document, -inf next to -1

retrieval/filters.py decides which documents are eligible. Reading a table needs neither FAISS nor an encoder.
"""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np

from megatron_cm3leon.data.shards.reader import MANIFEST, Corpus, check_seal, hash_content, open_shards, sha256_file

FORMAT = 1
INDEX_FILE = "index.json"
CHECKSUMS = "neighbors.crc32.npy"
CHECKED_ROWS = 256
"""Rows per checksum: few enough to check a row when it is read."""


@dataclass(kw_only=True)
class Neighbors:
    """The table of an index folder, its memory bank, and the checksums of its rows."""

    table: np.ndarray
    """int64 [documents, M], memory-mapped; -1: none."""
    bank: Corpus
    """Documents that the numbers of the table refer to."""
    path: Path
    checksums: np.ndarray | None = None
    """CRC-32 of every CHECKED_ROWS rows, uint32; None in an older index."""

    def __post_init__(self) -> None:
        self._checked = np.zeros(-(-len(self.table) // CHECKED_ROWS), bool)

    def check(self, rows: np.ndarray) -> None:
        """Verify the checksums of some rows (int64), each once per process; ValueError if the table is damaged."""
        if self.checksums is None:
            return
        pieces = np.unique(rows // CHECKED_ROWS)
        for piece in pieces[~self._checked[pieces]].tolist():
            if _checksum(self.table, piece) != self.checksums[piece]:
                first = piece * CHECKED_ROWS
                raise ValueError(
                    f"{self.path} is damaged: rows {first} to {min(first + CHECKED_ROWS, len(self.table)) - 1} do not "
                    f"match their crc32 in {CHECKSUMS}. Restore both files, or build the index again with "
                    f"tools/build_index.py --overwrite."
                )
        self._checked[pieces] = True


def checksum_rows(table: np.ndarray) -> np.ndarray:
    """CRC-32 of every CHECKED_ROWS rows, uint32."""
    return np.array([_checksum(table, piece) for piece in range(-(-len(table) // CHECKED_ROWS))], np.uint32)


def _checksum(table: np.ndarray, piece: int) -> int:
    return zlib.crc32(np.ascontiguousarray(table[piece * CHECKED_ROWS : (piece + 1) * CHECKED_ROWS]).data)


def manifest_sha256(corpus: Corpus) -> str:
    """Hash by which an index identifies a shard folder: of its content or, for older shards, of its manifest file."""
    if "content_sha256" in corpus.manifest:
        return hash_content(corpus.vocabulary.hash, corpus.shards)
    return sha256_file(corpus.folder / MANIFEST)


def load_neighbors(folder: str | Path, corpus: Corpus, bank_corpus: Corpus | None = None) -> Neighbors:
    """Open the table that tools/build_index.py wrote for `corpus`; `bank_corpus` replaces the recorded memory bank.

    Raises ValueError with the difference if the index belongs to other shards, another bank or another vocabulary.
    """
    folder = Path(folder)
    description = load_description(folder)
    check_corpus(folder, description, corpus, "shards")
    if bank_corpus is None:
        same = description["bank_manifest_sha256"] == description["shards_manifest_sha256"]
        bank_corpus = corpus if same else open_bank(folder, description)
    check_corpus(folder, description, bank_corpus, "bank")
    table = _map(folder / "neighbors.npy")
    checksums = _map(folder / CHECKSUMS) if (folder / CHECKSUMS).is_file() else None
    expected = (corpus.documents, description["neighbors"])
    if table.shape != expected or table.dtype != np.int64:
        raise ValueError(
            f"{folder / 'neighbors.npy'} is {table.dtype} {list(table.shape)} instead of int64 {list(expected)}; "
            f"build it again with tools/build_index.py."
        )
    pieces = (-(-corpus.documents // CHECKED_ROWS),)
    if checksums is not None and (checksums.shape != pieces or checksums.dtype != np.uint32):
        raise ValueError(
            f"{folder / CHECKSUMS} is {checksums.dtype} {list(checksums.shape)} instead of uint32 {list(pieces)}; "
            f"build it again with tools/build_index.py."
        )
    return Neighbors(table=table, bank=bank_corpus, path=folder / "neighbors.npy", checksums=checksums)


def _map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, SyntaxError, TokenError) as error:  # raised by numpy for a damaged header
        raise ValueError(f"{path} is unreadable ({error}); build the index again with tools/build_index.py.") from error


def load_description(folder: str | Path) -> dict:
    """Content of index.json, which is written last; ValueError if the folder holds no complete index."""
    path = Path(folder) / INDEX_FILE
    if not path.is_file():
        inside = sorted(str(found.parent) for found in Path(folder).glob(f"*/{INDEX_FILE}"))
        if inside:
            raise ValueError(f"no index at {folder}, but at {' and '.join(inside)}; give one of these.")
        raise ValueError(
            f"no index at {folder}: it has no {INDEX_FILE}, which is written last. Run tools/build_index.py with "
            f"--output {folder} (again, if it was interrupted)."
        )
    try:
        description = json.loads(path.read_text())
        found = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a valid description of an index ({type(error).__name__}: {error}).") from error
    check_seal(path, description)
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}; this version reads format {FORMAT}. Build the index again.")
    return description


def open_bank(folder: Path, description: dict) -> Corpus:
    """Open the memory bank at its recorded absolute path, or at its recorded path relative to the index."""
    paths = [Path(description["bank"]), Path(os.path.normpath(folder / description["bank_relative"]))]
    for path in paths:
        if (path / MANIFEST).is_file():
            return open_shards(path)
    raise ValueError(
        f"the memory bank of the index at {folder} is neither at {paths[0]} nor at {paths[1]}; restore the "
        f"shards there, or build the index again with --bank FOLDER."
    )


def check_corpus(folder: Path, description: dict, corpus: Corpus, role: str) -> None:
    """ValueError if a corpus is not the `role` ("shards" or "bank") that the index was built from."""
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
