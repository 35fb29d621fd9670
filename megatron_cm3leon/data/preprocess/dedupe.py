"""Exact duplicates in the whole input, found before anything is encoded, in bounded memory.

    .work/hashes-000000.npy    uint64 [inputs, 2, 2]: 128 bits of SHA-256 of images and of texts, 0 = not compared,
                               all ones = the input was unusable
    .work/duplicates.npy       uint8 [inputs of all parts]: 0 keep, 1 duplicate image, 2 duplicate caption,
                               3 the input was unusable, so it is not known whether it is a duplicate
    .work/starts.npy           int64 [parts + 1]: where each part starts in duplicates.npy

The first document of each group of duplicates is kept. Rejected documents (unreadable or filtered) are never kept as
the representative of a group, and a document removed for its image does not represent its caption. Captions are
compared as they are stored.
"""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

BY = ("picture", "caption")
REASONS = {number: f"duplicate {what}" for number, what in enumerate(BY, 1)}
UNUSABLE, UNKNOWN = np.uint64(2**64 - 1), 3
BUCKET_BYTES = 1 << 28
"""Memory of one pass over the hashes."""
_ROW_BYTES = 80
"""Memory per compared hash while finding duplicates: hash, position and their sorted copies."""


def hash_parts(parts: list[bytes]) -> np.ndarray:
    """128 bits of the SHA-256 of `parts`, uint64 [2]; zeros if there are none."""
    if not parts:
        return np.zeros(2, np.uint64)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if len(parts) == 1 else hashlib.sha256(part).digest())
    return np.frombuffer(digest.digest()[:16], np.uint64)


def find_unusable(hashes: np.ndarray) -> np.ndarray:
    """Whether each input of a part was unusable when it was hashed, bool [inputs]."""
    return (hashes == UNUSABLE).all((1, 2))


def hashes_path(work: Path, part: int) -> Path:
    """Path of a part's hashes in the work folder."""
    return work / f"hashes-{part:06d}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically: it is either complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def find_duplicates(work: Path, parts: int, by: tuple[str, ...]) -> None:
    """Write duplicates.npy and starts.npy from the hashes of all parts; does nothing if they exist.

    Several tasks may do this at once: they write the same bytes.
    """
    if (work / "duplicates.npy").is_file():
        return
    counts = [np.load(hashes_path(work, part), mmap_mode="r").shape[0] for part in range(parts)]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    dropped = np.zeros(starts[-1], np.uint8)
    for part, start in enumerate(starts[:-1].tolist()):
        unusable = find_unusable(np.load(hashes_path(work, part)))
        dropped[start : start + len(unusable)][unusable] = UNKNOWN
    buckets = max(1, -(-int(starts[-1]) * _ROW_BYTES // BUCKET_BYTES))
    for what in (what for what in BY if what in by):
        column = BY.index(what)
        for bucket in range(buckets):
            _mark_repeats(work, starts, column, bucket, buckets, dropped)
    save_array(work / "starts.npy", starts)
    save_array(work / "duplicates.npy", dropped)


def _mark_repeats(work: Path, starts: np.ndarray, column: int, bucket: int, buckets: int, dropped: np.ndarray) -> None:
    """Mark the inputs that repeat an earlier hash of this bucket in `dropped`, uint8 [inputs]."""
    hashes, positions = [], []
    for part, start in enumerate(starts[:-1].tolist()):
        both = np.load(hashes_path(work, part), mmap_mode="r")[:, column]
        chosen = both.any(1) & (dropped[start : start + len(both)] == 0)
        if buckets > 1:
            chosen &= both[:, 0] % np.uint64(buckets) == bucket
        rows = np.flatnonzero(chosen)
        hashes.append(both[rows])
        positions.append(rows + start)
    low, high = np.concatenate(hashes).T
    position = np.concatenate(positions)
    order = np.lexsort((position, high, low))
    low, high = low[order], high[order]
    repeats = np.flatnonzero((low[1:] == low[:-1]) & (high[1:] == high[:-1])) + 1
    dropped[position[order[repeats]]] = column + 1


def checksum(reasons: np.ndarray | None) -> int | None:
    """CRC-32 of a part's rows of duplicates.npy; None without --deduplicate."""
    return None if reasons is None else zlib.crc32(reasons.tobytes())


class Duplicates:
    """Duplicates among the inputs of each part, from the files that `find_duplicates` wrote."""

    def __init__(self, work: Path) -> None:
        self.starts = np.load(work / "starts.npy")
        self.dropped = np.load(work / "duplicates.npy", mmap_mode="r")

    def of_part(self, part: int) -> np.ndarray:
        """The part's rows of duplicates.npy, uint8 [inputs of the part]."""
        return self.dropped[self.starts[part] : self.starts[part + 1]]
