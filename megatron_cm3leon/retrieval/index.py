"""Nearest-neighbour indexes over unit vectors by inner product: the only file that imports FAISS.

Vectors are arrays or memory maps [documents, width] of float16 or float32; work goes through them in
pieces of bounded size. Where FAISS has GPUs they train, and search what FAISS can search there.
"""

import logging
import os
import re
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.threads import one_blas_thread
from megatron_cm3leon.retrieval.part_arrays import to_float32

try:
    import faiss
except ImportError as error:
    faiss, _IMPORT_ERROR = None, error
else:
    _IMPORT_ERROR = None

logger = logging.getLogger(__name__)

PIECE = 65536
"""Vectors converted to float32 at a time."""
TRAINING_VECTORS_A_LIST = 40
LARGEST_FLAT = 200_000
LARGEST_PLAIN_IVF = 10_000_000
_WITHOUT_LINKS = re.compile(r"(HNSW|NSG)[01](?!\d)")


def require_faiss() -> None:
    """ValueError where FAISS cannot be imported; whatever needs it asks before it begins its work."""
    if faiss is None:
        raise ValueError(
            f"FAISS, which retrieval searches with, cannot be imported ({_IMPORT_ERROR}); install faiss-cpu, or "
            f"faiss-gpu on a machine with GPUs (docs/installation.md)."
        )


def choose_factory(documents: int, width: int) -> str:
    """FAISS factory string for a bank of `documents` vectors of `width`.

    Up to 200,000 vectors exact search takes minutes. Beyond, fast-scan product quantisation with refinement: of the
    options of benchmarks/index.py the quickest that reaches recall@10 of 0.95, the build counted. Lists of vectors grow
    with the root of their number; beyond 10,000,000 an HNSW graph finds the lists.
    """
    if documents <= LARGEST_FLAT:
        return "Flat"
    lists = 1 << round(np.log2(4 * documents**0.5))
    if width % 8:
        return f"IVF{lists},SQfp16"
    if documents <= LARGEST_PLAIN_IVF:
        return f"IVF{lists},PQ{width // 4}x4fs,Refine(SQfp16)"
    return f"IVF{max(lists, 65536)}_HNSW32,PQ{width // 8}x4fs,Refine(SQ8)"


def build_index(vectors, factory: str, parameters: str = "", seed: int = 0, advance=lambda count: None):
    """Train and fill a FAISS index; ValueError when FAISS does not accept the factory string or a vector is not finite.

    `advance(count)` is called after each piece of vectors that was added.
    """
    require_faiss()
    documents, width = vectors.shape
    try:
        if _WITHOUT_LINKS.search(factory):
            raise RuntimeError("a graph needs at least 2 links per vector")  # FAISS ends the process, or never ends
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)  # at once: they may not suit the factory
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
            f"index factory {factory!r} (search {parameters!r}) does not suit {documents} vectors of width {width}: "
            f"{_find_reason(error)}. Give another --factory, such as Flat or IVF{max(1, round(documents**0.5))},Flat"
            f"{', or another --search' if parameters else ''}."
        ) from error
    return index


def _find_reason(error: RuntimeError) -> str:
    """What FAISS reports, without the place in its sources."""
    return re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).splitlines()[0]).strip().rstrip(".")


def _try_search(index) -> None:
    """Search once: some factories and search parameters fail only then, with a RuntimeError."""
    if index.ntotal:
        index.search(np.zeros((1, index.d), np.float32), 1)


def check_finite(vectors: np.ndarray, numbers) -> None:
    """ValueError that names the first document of `numbers` whose vector holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the embedding of document {numbers[int(bad[0])]} holds NaN or infinity ({len(bad)} of {len(vectors)} "
            f"vectors looked at): the encoder's weights or the embeddings' file are damaged. Check the CLIP folder "
            f"(in fp32), then encode again with --overwrite."
        )


def _train(index, vectors, seed: int) -> None:
    """Train on a seeded choice of vectors in storage order, enough for the number of lists."""
    ivf = _find_ivf(index)
    wanted = min(len(vectors), max(TRAINING_VECTORS_A_LIST * (ivf.nlist if ivf else 1024), PIECE))
    chosen = np.sort(np.random.default_rng(seed).choice(len(vectors), wanted, replace=False))
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
    """GPUs that FAISS can use: 0 for the package faiss-cpu."""
    return faiss.get_num_gpus()


def place_for_search(index):
    """The index on all GPUs where FAISS has them and can search it there, else itself."""
    if not _count_gpus():
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        logger.info("FAISS searches %s on the CPU: %s", type(index).__name__, str(error).splitlines()[0])
        return index


def search_index(index, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and numbers int64 [n, count] of the best `count`; -1 where the index finds no more."""
    scores, numbers = index.search(np.ascontiguousarray(queries, np.float32), count)
    return scores, numbers


def search_exact(vectors, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`search_index` by comparing with every vector, piece by piece."""
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
        """Score from which on a document is one of the best; equal scores count as found."""

    def measure(self, index) -> np.ndarray:
        """Share of the best `count` that the index finds, for each query."""
        _, numbers = search_index(index, self.queries, self.count)
        vectors = to_float32(self.vectors[numbers.clip(0)])
        with one_blas_thread():
            found = np.matmul(vectors, self.queries[:, :, None])[:, :, 0]
        return ((numbers >= 0) & (found >= self.least)).mean(axis=1)


def tune_search(index, recall: Recall, target: float) -> str:
    """Set and return search parameters whose measured recall reaches `target` by a standard error.

    Starts cheap and raises, step by step, the parameter that gains most for the memory it reads: nprobe of an inverted
    file, k_factor_rf under Refine, efSearch of an HNSW graph; then lowers again what can be. The rest has nothing to
    tune: "". Where the target is out of reach, the largest values are kept.
    """
    steps = _list_steps(index)

    def measure(places: dict[str, int]) -> tuple[float, bool]:
        set_parameters(index, _spell(steps, places))
        found = recall.measure(index)
        return found.mean(), found.mean() - found.std() / max(1, len(found)) ** 0.5 >= target

    chosen = dict.fromkeys(steps, 0)
    found, enough = measure(chosen)
    while not enough:
        raised = [{**chosen, name: place + 1} for name, place in chosen.items() if place + 1 < len(steps[name])]
        if not raised:
            break
        results = [measure(places) for places in raised]
        cost = _count_bytes(index, recall.count, steps, chosen)
        worth = [
            (result[0] - found) / (_count_bytes(index, recall.count, steps, places) - cost)
            for places, result in zip(raised, results, strict=True)
        ]
        best = int(np.argmax(worth))
        chosen, (found, enough) = raised[best], results[best]
    for name in chosen:
        while enough and chosen[name] and measure({**chosen, name: chosen[name] - 1})[1]:
            chosen[name] -= 1
    set_parameters(index, _spell(steps, chosen))
    return _spell(steps, chosen)


def _count_bytes(index, count: int, steps: dict[str, list[int]], places: dict[str, int]) -> float:
    """About how much memory a search for `count` reads; what Refine reads lies scattered: it counts four times."""
    values = {name: steps[name][place] for name, place in places.items()}
    ivf = _find_ivf(index)
    read = values["nprobe"] * index.ntotal / ivf.nlist * ivf.code_size if ivf else values["efSearch"]
    return read + 4 * values.get("k_factor_rf", 0) * count * 2 * index.d


def _list_steps(index) -> dict[str, list[int]]:
    """Values of each search parameter from cheap to thorough, each about 1.4 times the one before."""
    steps = sorted({round(2 ** (half / 2)) for half in range(40)})
    ivf = _find_ivf(index)
    if ivf:
        probes = [*(step for step in steps if 8 <= step < ivf.nlist), ivf.nlist]
        refined = isinstance(index, faiss.IndexRefine)
        return {"nprobe": probes} | ({"k_factor_rf": [step for step in steps if 4 <= step <= 128]} if refined else {})
    if isinstance(index, faiss.IndexHNSW):
        return {"efSearch": [step for step in steps if 16 <= step <= 4096]}
    return {}


def _spell(steps: dict[str, list[int]], places: dict[str, int]) -> str:
    return ",".join(f"{name}={steps[name][place]}" for name, place in places.items())


def set_parameters(index, parameters: str) -> None:
    """Set search parameters such as nprobe=64,k_factor_rf=8; "" leaves them; ValueError for one the index has not."""
    if not parameters:
        return
    try:
        faiss.ParameterSpace().set_index_parameters(index, parameters)
        _try_search(index)
    except RuntimeError as error:
        raise ValueError(
            f"--search {parameters!r} does not suit the index: {_find_reason(error)}. Give other parameters, or none: "
            f"they are then chosen by measured recall."
        ) from error


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
        raise ValueError(f"{path} is damaged or no FAISS index; build it again with tools/build_index.py.") from error
    set_parameters(index, parameters)
    return index
