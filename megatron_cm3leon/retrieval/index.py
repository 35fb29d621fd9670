"""Nearest-neighbor indexes over unit vectors by inner product: the only file that imports FAISS.

Vectors are arrays or memory maps [documents, width] of float16 or float32, and are processed in pieces of bounded size.
If FAISS supports GPUs they are used for training, and to search the index types that FAISS can search there.
"""

import logging
import os
import re
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.threads import one_blas_thread
from megatron_cm3leon.retrieval.part_arrays import to_float32

_IMPORT_ERROR: ImportError | None = None
try:
    import faiss
except ImportError as error:
    faiss, _IMPORT_ERROR = None, error  # type: ignore[assignment]  # `require_faiss` reports it

logger = logging.getLogger(__name__)

PIECE = 65536
"""Vectors converted to float32 at a time."""
TRAINING_VECTORS_PER_LIST = 40
MAX_FLAT = 200_000
"""Largest bank, in documents, that is searched exactly."""
MAX_PLAIN_IVF = 10_000_000
"""Largest bank, in documents, whose inverted lists are found without a graph."""
_WITHOUT_LINKS = re.compile(r"(HNSW|NSG)[01](?!\d)")


def require_faiss() -> None:
    """Raise ValueError if FAISS cannot be imported; called before long work that requires it."""
    if faiss is None:
        raise ValueError(
            f"FAISS, which retrieval requires, cannot be imported ({_IMPORT_ERROR}); install faiss-cpu, or "
            f"faiss-gpu on a machine with GPUs (docs/installation.md)."
        )


def choose_factory(documents: int, width: int) -> str:
    """FAISS factory string for a bank of `documents` vectors of `width`.

    Up to 200,000 vectors exact search takes minutes. Beyond, fast-scan product quantization with refinement: of the
    options of benchmarks/index.py the fastest that reaches recall@10 of 0.95, including the build. The number of lists
    grows with the square root of the number of vectors; beyond 10,000,000 an HNSW graph finds the lists.
    """
    if documents <= MAX_FLAT:
        return "Flat"
    lists = 1 << round(np.log2(4 * documents**0.5))
    if width % 8:
        return f"IVF{lists},SQfp16"
    if documents <= MAX_PLAIN_IVF:
        return f"IVF{lists},PQ{width // 4}x4fs,Refine(SQfp16)"
    return f"IVF{max(lists, 65536)}_HNSW32,PQ{width // 8}x4fs,Refine(SQ8)"


def build_index(vectors, factory: str, parameters: str = "", seed: int = 0, advance=lambda count: None):
    """Train and fill a FAISS index; ValueError if FAISS refuses the factory string, or if a vector is not finite.

    `parameters` are search parameters to check. `advance(count)` is called after each piece of vectors that was added.
    """
    require_faiss()
    documents, width = vectors.shape
    try:
        if _WITHOUT_LINKS.search(factory):
            raise RuntimeError("a graph requires at least 2 links per vector")  # FAISS would crash or never return
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if parameters:
            _set_parameters(index, parameters)  # first: they may not be valid for it
        if not index.is_trained:
            _train(index, vectors, seed)
        for start in range(0, documents, PIECE):
            piece = to_float32(vectors[start : start + PIECE])
            check_finite(piece, range(start, start + len(piece)))
            index.add(piece)
            advance(len(piece))
        _try_search(index)
    except RuntimeError as error:
        raise ValueError(
            f"index factory {factory!r} (search {parameters!r}) is not valid for {documents} vectors of width {width}: "
            f"{_find_reason(error)}. Give another --factory, such as Flat or IVF{max(1, round(documents**0.5))},Flat"
            f"{', or another --search' if parameters else ''}."
        ) from error
    return index


def _find_reason(error: RuntimeError) -> str:
    """The reason that FAISS gives, without its source file and line."""
    return re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).splitlines()[0]).strip().rstrip(".")


def _try_search(index) -> None:
    """Search once: some factories and search parameters fail only on a search, with a RuntimeError."""
    if index.ntotal:
        index.search(np.zeros((1, index.d), np.float32), 1)


def check_finite(vectors: np.ndarray, numbers) -> None:
    """Raise ValueError if a vector holds NaN or infinity; `numbers` are the documents' numbers, for the message."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the embedding of document {numbers[int(bad[0])]} holds NaN or infinity ({len(bad)} of {len(vectors)} "
            f"vectors checked): the encoder's weights or the file of embeddings are damaged. Check the CLIP folder "
            f"(in fp32), then encode again with --overwrite."
        )


def _train(index, vectors, seed: int) -> None:
    """Train on a seeded random sample of vectors in storage order, large enough for the number of lists."""
    ivf = _find_ivf(index)
    count = min(len(vectors), max(TRAINING_VECTORS_PER_LIST * (ivf.nlist if ivf else 1024), PIECE))
    chosen = np.sort(np.random.default_rng(seed).choice(len(vectors), count, replace=False))
    sample = to_float32(vectors[chosen])
    check_finite(sample, chosen)
    if ivf and _count_gpus():
        clustering = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(index.d))  # k-means is most of the training
        ivf.clustering_index = clustering
        index.train(sample)
        ivf.clustering_index = None
        return
    index.train(sample)


def _find_ivf(index):
    """The inverted file inside an index, or None."""
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None


def _count_gpus() -> int:
    """Number of GPUs that FAISS can use: 0 for the package faiss-cpu."""
    return faiss.get_num_gpus()


def move_to_gpus(index):
    """The index on all GPUs, or itself if FAISS has no GPUs or cannot search this type of index there."""
    if not _count_gpus():
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        logger.info("FAISS searches %s on the CPU: %s", type(index).__name__, str(error).splitlines()[0])
        return index


def search_index(index, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest documents of each query: scores (float32) and document numbers (int64), both [n, count].

    -1 fills the row if fewer are found.
    """
    scores, numbers = index.search(np.ascontiguousarray(queries, np.float32), count)
    return scores, numbers


def search_exact(vectors, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `search_index`, but compares with every vector, piece by piece."""
    require_faiss()
    heap = faiss.ResultHeap(len(queries), count, keep_max=True)
    queries = np.ascontiguousarray(queries, np.float32)
    for start in range(0, len(vectors), PIECE):
        piece = to_float32(vectors[start : start + PIECE])
        scores, numbers = faiss.knn(queries, piece, min(count, len(piece)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, numbers + start)
    heap.finalize()
    return heap.D, heap.I


class Recall:
    """Recall of an index against exact search on a sample of queries; the exact search is done once."""

    def __init__(self, vectors, queries: np.ndarray, count: int = 10) -> None:
        self.vectors, self.queries = vectors, np.asarray(queries, np.float32)
        self.count = min(count, len(vectors))
        exact, _ = search_exact(vectors, self.queries, self.count)
        self.least = exact[:, -1:] - 1e-5
        """Smallest score of the best `count` documents; a document with an equal score counts as found."""

    def measure(self, index) -> np.ndarray:
        """Share of the best `count` documents that the index finds, for each query, float64 [n]."""
        _, numbers = search_index(index, self.queries, self.count)
        vectors = to_float32(self.vectors[numbers.clip(0)])
        with one_blas_thread():
            found = np.matmul(vectors, self.queries[:, :, None])[:, :, 0]
        return ((numbers >= 0) & (found >= self.least)).mean(axis=1)


def tune_search(index, recall: Recall, target: float) -> str:
    """Set and return search parameters whose measured recall exceeds `target` by a standard error.

    Starts with the cheapest values. Then raises in each step the parameter that gains most recall for the memory it
    reads: nprobe of an inverted file, k_factor_rf with Refine, efSearch of an HNSW graph. At the end lowers again those
    that can be. Other indexes have nothing to tune: "". If the target cannot be reached, the largest values are set.
    """
    values = _list_values(index)

    def measure(positions: dict[str, int]) -> tuple[float, bool]:
        set_parameters(index, _format_parameters(values, positions))
        found = recall.measure(index)
        return found.mean(), found.mean() - found.std() / max(1, len(found)) ** 0.5 >= target

    chosen = dict.fromkeys(values, 0)
    found, reached = measure(chosen)
    while not reached:
        raised = [
            {**chosen, name: position + 1} for name, position in chosen.items() if position + 1 < len(values[name])
        ]
        if not raised:
            break
        results = [measure(positions) for positions in raised]
        cost = _estimate_bytes(index, recall.count, values, chosen)
        gains = [
            (result[0] - found) / (_estimate_bytes(index, recall.count, values, positions) - cost)
            for positions, result in zip(raised, results, strict=True)
        ]
        best = int(np.argmax(gains))
        chosen, (found, reached) = raised[best], results[best]
    for name in chosen:
        while reached and chosen[name] and measure({**chosen, name: chosen[name] - 1})[1]:
            chosen[name] -= 1
    set_parameters(index, _format_parameters(values, chosen))
    return _format_parameters(values, chosen)


def _estimate_bytes(index, count: int, values: dict[str, list[int]], positions: dict[str, int]) -> float:
    """Approximate memory that a search for `count` reads. Refine reads scattered vectors, which are counted 4 times."""
    chosen = {name: values[name][position] for name, position in positions.items()}
    ivf = _find_ivf(index)
    read = chosen["nprobe"] * index.ntotal / ivf.nlist * ivf.code_size if ivf else chosen["efSearch"]
    return read + 4 * chosen.get("k_factor_rf", 0) * count * 2 * index.d


def _list_values(index) -> dict[str, list[int]]:
    """Values of each search parameter from cheap to thorough, each about 1.4 times the previous one."""
    steps = sorted({round(2 ** (half / 2)) for half in range(40)})
    ivf = _find_ivf(index)
    if ivf:
        probes = [*(step for step in steps if 8 <= step < ivf.nlist), ivf.nlist]
        refined = isinstance(index, faiss.IndexRefine)
        return {"nprobe": probes} | ({"k_factor_rf": [step for step in steps if 4 <= step <= 128]} if refined else {})
    if isinstance(index, faiss.IndexHNSW):
        return {"efSearch": [step for step in steps if 16 <= step <= 4096]}
    return {}


def _format_parameters(values: dict[str, list[int]], positions: dict[str, int]) -> str:
    return ",".join(f"{name}={values[name][position]}" for name, position in positions.items())


def set_parameters(index, parameters: str) -> None:
    """Set search parameters such as nprobe=64,k_factor_rf=8; "" keeps them. ValueError if the index lacks one."""
    if not parameters:
        return
    try:
        _set_parameters(index, parameters)
        _try_search(index)
    except RuntimeError as error:
        raise ValueError(
            f"--search {parameters!r} is not valid for the index: {_find_reason(error)}. Give other parameters, or "
            f"none: they are then chosen by measured recall."
        ) from error


def _set_parameters(index, parameters: str) -> None:
    space = faiss.ParameterSpace()
    space.set_index_parameters(index, parameters)  # type: ignore[arg-type]  # FAISS annotates one overload alone


def save_index(index, path: str | Path) -> None:
    """Write the index under a temporary name, then rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    faiss.write_index(index, str(temporary))
    os.replace(temporary, path)


def load_index(path: str | Path, parameters: str = ""):
    """Read an index that `save_index` wrote and set its search parameters."""
    require_faiss()
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no FAISS index at {path}; tools/build_index.py writes one.")
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} is damaged or not a FAISS index; build it again with tools/build_index.py."
        ) from error
    set_parameters(index, parameters)
    return index
