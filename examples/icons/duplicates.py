"""Near-duplicates among thumbnails: exact distances between all pairs, by matrix products of blocks."""

import numpy as np

from megatron_cm3leon.common.progress import track

BLOCK = 1024


def find_near_duplicates(thumbnails: np.ndarray, distance: float) -> np.ndarray:
    """For each thumbnail, the number of the earlier one that it repeats, or -1.

    thumbnails: uint8 [n, height, width, 3]. Two images are near-duplicates if the root of their squared difference is
    at most `distance` times that of the darker of the two from white: a line drawing is mostly white, so equal
    levels of difference mean more in it. Of near-duplicates the first one is kept; only kept ones are compared with.
    """
    vectors = 255 - thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    squares = np.einsum("nx,nx->n", vectors, vectors)
    originals = np.full(len(vectors), -1)
    for first in track(range(0, len(vectors), BLOCK), label="near-duplicates", unit="blocks"):
        block = np.arange(first, min(first + BLOCK, len(vectors)))
        kept = np.flatnonzero(originals[:first] < 0)
        for start in range(0, len(kept), 8 * BLOCK):
            some = kept[start : start + 8 * BLOCK]
            _match(vectors, squares, originals, block, some, distance)
        close = _are_close(vectors, squares, block, block, distance)
        for number, row in zip(block, np.tril(close, -1), strict=True):
            earlier = block[row]
            earlier = earlier[originals[earlier] < 0]
            if originals[number] < 0 and len(earlier):
                originals[number] = earlier[0]
    return originals


def _are_close(vectors: np.ndarray, squares: np.ndarray, rows: np.ndarray, columns: np.ndarray, distance: float):
    """bool [rows, columns]"""
    apart = squares[rows, None] + squares[columns] - 2 * vectors[rows] @ vectors[columns].T
    # Distances of equal images are not exactly 0 in float32.
    return apart <= np.maximum(distance**2, 1e-5) * np.maximum(squares[rows, None], squares[columns])


def _match(vectors, squares, originals: np.ndarray, block: np.ndarray, kept: np.ndarray, distance: float) -> None:
    """Enter, for those of `block` that have none yet, the first of `kept` that they repeat."""
    close = _are_close(vectors, squares, block, kept, distance)
    found = close.any(axis=1) & (originals[block] < 0)
    originals[block[found]] = kept[close[found].argmax(axis=1)]
