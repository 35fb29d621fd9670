"""Nearest-neighbour indexes over unit vectors by inner product: the only file that imports FAISS.

Vectors are arrays or memory maps [documents, width] of float16 or float32; work goes through them in
pieces of bounded size.
"""

import os
from pathlib import Path

import faiss
import numpy as np

PIECE = 65536
"""Vectors converted to float32 at a time."""
TRAINING_VECTORS_A_LIST = 64
LARGEST_FLAT = 200_000


def choose_factory(documents: int, width: int) -> tuple[str, str]:
    """FAISS factory string and search parameters for a bank of `documents` vectors of `width`.

    Up to 200,000 vectors exact search takes minutes; beyond, the settings that reached recall@10 of 0.95 at
    1,000,000 vectors of width 512 for the least time with the build counted, and their growth for 100,000,000.
    """
    if documents <= LARGEST_FLAT:
        return "Flat", ""
    if documents <= 10_000_000:
        lists = 4096 if documents <= 2_000_000 else 16384
        return f"IVF{lists},PQ{width // 4}x4fs,Refine(SQfp16)", "nprobe=384,k_factor_rf=8"
    return f"IVF262144_HNSW32,PQ{width // 8}x4fs,Refine(SQ8)", "nprobe=384,k_factor_rf=8"


def build_index(vectors, factory: str, parameters: str = "", seed: int = 0, advance=lambda count: None):
    """Train and fill a FAISS index; ValueError when FAISS does not accept the factory string.

    `advance(count)` is called after each piece of vectors that was added.
    """
    documents, width = vectors.shape
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
        if not index.is_trained:
            index.train(_training_sample(vectors, index, seed))
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(": ", 1)[-1]
        raise ValueError(
            f"index factory {factory!r} (search {parameters!r}) does not suit {documents} vectors of width {width}: "
            f"{reason}. Give another --factory, such as Flat or IVF{max(1, round(documents**0.5))},Flat."
        ) from error
    for start in range(0, documents, PIECE):
        piece = np.ascontiguousarray(vectors[start : start + PIECE], np.float32)
        index.add(piece)
        advance(len(piece))
    return index


def _training_sample(vectors, index, seed: int) -> np.ndarray:
    """Vectors to train on: a seeded choice, in storage order, enough for the number of lists."""
    try:
        lists = faiss.extract_index_ivf(index).nlist
    except RuntimeError:
        lists = 1024
    wanted = min(len(vectors), max(TRAINING_VECTORS_A_LIST * lists, PIECE))
    chosen = np.sort(np.random.default_rng(seed).choice(len(vectors), wanted, replace=False))
    return np.ascontiguousarray(vectors[chosen], np.float32)


def search_index(index, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and numbers int64 [n, count] of the best `count`; -1 where the index finds no more."""
    scores, numbers = index.search(np.ascontiguousarray(queries, np.float32), count)
    return scores, numbers


def search_exact(vectors, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`search_index` by comparing with every vector, piece by piece."""
    heap = faiss.ResultHeap(len(queries), count, keep_max=True)
    queries = np.ascontiguousarray(queries, np.float32)
    for start in range(0, len(vectors), PIECE):
        piece = np.ascontiguousarray(vectors[start : start + PIECE], np.float32)
        scores, numbers = faiss.knn(queries, piece, min(count, len(piece)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, numbers + start)
    heap.finalize()
    return heap.D, heap.I


def measure_recall(index, vectors, queries: np.ndarray, count: int = 10) -> float:
    """Share of the exact best `count` that the index finds; equal scores count as found."""
    count = min(count, len(vectors))
    exact, _ = search_exact(vectors, queries, count)
    _, numbers = search_index(index, queries, count)
    found = np.einsum("qd,qkd->qk", np.asarray(queries, np.float32), vectors[numbers.clip(0)].astype(np.float32))
    hits = (numbers >= 0) & (found >= exact[:, -1:] - 1e-5)
    return float(hits.mean())


def save_index(index, path: str | Path) -> None:
    """Write the index under a temporary name, then rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    faiss.write_index(index, str(temporary))
    os.replace(temporary, path)


def load_index(path: str | Path, parameters: str = ""):
    """Read an index that `save_index` wrote and set its search parameters."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no FAISS index at {path}; tools/build_index.py writes one.")
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged or no FAISS index; build it again with tools/build_index.py.") from error
    if parameters:
        faiss.ParameterSpace().set_index_parameters(index, parameters)
    return index
