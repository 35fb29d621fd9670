"""FAISS options for the neighbors of all documents of a corpus: build, recall@10, search time, memory.

    python benchmarks/index.py --folder /scratch/vectors                 1,000,000 x 512
    python benchmarks/index.py --folder /scratch/vectors --documents 100000

Vectors are created once, in `--folder`: 20,000 clusters. The centers, and the offsets of vectors from their centers,
have variances that fall as i^-0.5 over 512 randomly rotated directions (an assumption about CLIP's spectrum; --spectrum
1 is harder, because neighbors then often belong to other clusters). The cosine of a vector to its center is about 0.74.
Each option runs in its own process with `--threads` threads: it trains the index, adds all vectors in pieces, chooses
the search parameters by measured recall, and measures recall on other queries. Then it searches `--queries` documents
of the corpus in rounds, alternating with exact search (faiss.knn) of some of them; times for all documents are
extrapolated from these. `x exact` is the time of exact search divided by the time of build and search, for all
documents. `table` is the work of tools/build_index.py with the index: two searches per document, and the filters.
Seconds are CPU time of all threads, so other work on the machine has little influence.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np

from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.retrieval.filters import Bank, Queries, find_neighbors
from megatron_cm3leon.retrieval.index import (
    Recall,
    build_index,
    choose_factory,
    save_index,
    search_exact,
    search_index,
    set_parameters,
    tune_search,
)

CLUSTERS, COSINE_TO_CENTER = 20_000, 0.74
PIECE = 50_000
RECALL_QUERIES = 1000
OPTIONS = ("IVF4096,Flat", "IVF4096,SQ8", "HNSW32,SQfp16", "IVF4096,PQ64")


def make_vectors(folder: Path, documents: int, width: int, spectrum: float, seed: int) -> Path:
    """Write unit vectors, float16 [documents, width], piece by piece, unless the file exists; returns its path."""
    path = folder / f"vectors-{documents}-{width}-{spectrum}-{seed}.npy"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    deviations = np.arange(1, width + 1, dtype=np.float32) ** (-spectrum / 2)
    rotation = np.linalg.qr(random.standard_normal((width, width)))[0].astype(np.float32)
    centers = unit(random.standard_normal((CLUSTERS, width), np.float32) * deviations)
    temporary = path.with_suffix(".tmp")
    array = np.lib.format.open_memmap(temporary, "w+", np.float16, (documents, width))
    for start in range(0, documents, PIECE):
        rows = slice(start, min(start + PIECE, documents))
        chosen = centers[random.integers(0, CLUSTERS, rows.stop - start)]
        offsets = unit(random.standard_normal(chosen.shape, np.float32) * deviations)
        vectors = COSINE_TO_CENTER * chosen + (1 - COSINE_TO_CENTER**2) ** 0.5 * offsets
        array[rows] = unit(vectors) @ rotation
    array.flush()
    os.replace(temporary, path)
    return path


def unit(vectors: np.ndarray) -> np.ndarray:
    """Normalize each row to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def peak_gigabytes() -> float:
    """Peak resident memory of this process, including mapped pages of files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure_option(path: Path, factory: str, options: argparse.Namespace) -> dict:
    """Measure one factory string; returns its row of the table."""
    faiss.omp_set_num_threads(options.threads)
    vectors = np.load(path, mmap_mode="r")
    documents = len(vectors)
    chosen = np.random.default_rng(1).permutation(documents)[: 2 * RECALL_QUERIES + options.queries]
    tuning, testing, timed = np.split(chosen, [RECALL_QUERIES, 2 * RECALL_QUERIES])
    started = time.process_time()
    index = build_index(vectors, factory)
    built = time.process_time() - started
    started = time.process_time()
    parameters = options.search or tune_search(index, Recall(vectors, vectors[np.sort(tuning)]), options.recall)
    set_parameters(index, parameters)
    tuned = time.process_time() - started
    recall = Recall(vectors, vectors[np.sort(testing)]).measure(index)
    ours, exact, ours_queries, exact_queries = 0.0, 0.0, 0, 0
    for part in np.array_split(timed, options.rounds):
        queries = np.asarray(vectors[np.sort(part)], np.float32)
        started = time.process_time()
        search_index(index, queries, options.count)
        ours, ours_queries = ours + time.process_time() - started, ours_queries + len(queries)
        queries = queries[: options.exact_queries]
        started = time.process_time()
        search_exact(vectors, queries, options.count)
        exact, exact_queries = exact + time.process_time() - started, exact_queries + len(queries)
    peak = peak_gigabytes()
    stored = path.with_name(f".{os.getpid()}.faiss")
    save_index(index, stored)
    size = stored.stat().st_size
    stored.unlink()
    search_all, exact_all = ours * documents / ours_queries, exact * documents / exact_queries
    return {
        "factory": factory,
        "search": parameters,
        "recall": float(recall.mean()),
        "build_s": built,
        "tune_s": tuned,
        "search_all_s": search_all,
        "exact_all_s": exact_all,
        "table_all_s": measure_table(index, vectors, timed[: options.table_queries]) * documents,
        "times_exact": exact_all / (built + search_all),
        "times_exact_with_tuning": exact_all / (built + tuned + search_all),
        "bytes_a_vector": size / documents,
        "peak_gb": peak,
    }


def measure_table(index, vectors: np.ndarray, chosen: np.ndarray) -> float:
    """Seconds per document of the neighbor table: two searches for 32 candidates each, and the filters."""
    chosen = np.sort(chosen)
    identities = np.arange(2 * len(vectors), dtype=np.uint64).reshape(-1, 1, 2)
    queries = np.array(vectors[chosen])
    started = time.process_time()
    find_neighbors(
        lambda part, count: search_index(index, part, count),
        Bank(vectors=vectors, identities=identities),
        Queries(vectors=queries, identities=identities[chosen], bank_numbers=chosen, views=(queries, queries)),
        8,
    )
    return (time.process_time() - started) / len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder to create and keep the vectors in")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--spectrum", type=float, default=0.5, help="exponent s of the variances i^-s")
    parser.add_argument(
        "--factory", nargs="*", default=[], help="FAISS factory strings (empty: the one chosen by size, and others)"
    )
    parser.add_argument("--search", default="", help="search parameters (empty: chosen by measured recall)")
    parser.add_argument(
        "--recall", type=float, default=0.95, help="target recall@10 for choosing the search parameters"
    )
    parser.add_argument("--queries", type=int, default=8000, help="documents searched for the extrapolation")
    parser.add_argument("--exact-queries", type=int, default=2000, help="number of them searched exactly per round")
    parser.add_argument("--table-queries", type=int, default=1024, help="documents whose row of the table is timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--count", type=int, default=10, help="neighbors per query of the timed searches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append each row to this file")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # set in the process that measures one option
    options = parser.parse_args()
    path = make_vectors(options.folder, options.documents, options.width, options.spectrum, seed=0)
    if options.only:
        print(json.dumps(measure_option(path, options.only, options)))
        return
    columns = (
        "option",
        "search",
        "recall@10",
        "build, s",
        "choose search, s",
        "all, s",
        "exact, s",
        "x exact",
        "table, s",
    )
    columns += ("bytes per vector", "peak GB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for factory in options.factory or (choose_factory(options.documents, options.width), *OPTIONS):
        done = subprocess.run([sys.executable, *sys.argv, "--only", factory], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise ValueError(f"{factory} could not be measured (exit status {done.returncode}).")
        row = json.loads(done.stdout.splitlines()[-1])
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps(row) + "\n")
        cells = [row["factory"], row["search"], f"{row['recall']:.3f}"]
        cells += [f"{row[name]:.0f}" for name in ("build_s", "tune_s", "search_all_s", "exact_all_s")]
        cells += [f"{row['times_exact']:.1f}", f"{row['table_all_s']:.0f}"]
        cells += [f"{row['bytes_a_vector']:.0f}", f"{row['peak_gb']:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_tool(main)
