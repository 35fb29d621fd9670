"""The neighbor table of an index folder: written in parts, which an interrupted run or several tasks complete."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.data.neighbors import CHECKSUMS
from megatron_cm3leon.retrieval.filters import NO_NEIGHBOR, Bank, Queries, Search, find_neighbors
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.retrieval.part_arrays import PartitionedArrays

logger = logging.getLogger(__name__)

PART_NEIGHBORS = 65536
"""Documents per part of the table."""
TABLE_FILES = ("table.json", "neighbors.npy", CHECKSUMS, "scores.npy")
_QUERY_BATCH = 1024


def open_table(folder: Path, documents: int, options: IndexOptions, settings: dict) -> PartitionedArrays:
    """The arrays neighbors and scores; `settings` describes the queries and the index they are searched in."""
    filters = {
        "neighbors": options.neighbors,
        "threshold": options.threshold,
        "candidates": options.candidates,
        "max_candidates": options.max_candidates,
    }
    arrays = ["neighbors", "scores"]
    return PartitionedArrays(folder, "table", arrays, documents, PART_NEIGHBORS, {**settings, **filters})


def write_table(
    table: PartitionedArrays, parts: Sequence[int], search: Search, bank: Bank, queries: Queries, options: IndexOptions
) -> None:
    """Find the neighbors of all documents of `parts` and write them."""
    with meter(sum(len(table.part_range(part)) for part in parts), "neighbors", "documents") as progress:
        for part in parts:
            results, numbers = [], table.part_range(part)
            for start in range(numbers.start, numbers.stop, _QUERY_BATCH):
                found = find_neighbors(
                    search,
                    bank,
                    queries.select(slice(start, min(start + _QUERY_BATCH, numbers.stop))),
                    options.neighbors,
                    threshold=options.threshold,
                    candidates=options.candidates,
                    max_candidates=options.max_candidates,
                )
                results.append(found)
                progress.advance(len(found[0]))
            neighbors, scores = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
            table.write_part(part, {"neighbors": neighbors, "scores": scores})


def count_neighbors(neighbors: np.ndarray) -> list[int]:
    """Number of documents with 0, 1, ... M neighbors; `neighbors` is int64 [documents, M]."""
    counts = np.zeros(neighbors.shape[1] + 1, np.int64)
    for start in range(0, len(neighbors), PART_NEIGHBORS):
        found = (neighbors[start : start + PART_NEIGHBORS] != NO_NEIGHBOR).sum(axis=1)
        counts += np.bincount(found, minlength=len(counts))
    return counts.tolist()


def count_shared_images(queries: Queries, bank: Bank) -> int:
    """Number of query documents with an image that the bank also holds. Logs a warning if there are any.

    Held-out documents should have none.
    """
    query_identities = np.unique(queries.identities)
    starts = range(0, len(bank.identities), PART_NEIGHBORS)
    pieces = [bank.identities[start : start + PART_NEIGHBORS] for start in starts]
    shared = np.unique(np.concatenate([np.intersect1d(piece, query_identities) for piece in pieces]))
    count = int(np.isin(queries.identities, shared[shared != 0]).any(axis=(1, 2)).sum())
    if count:
        logger.warning(
            "%d of %d documents have an image that the memory bank also holds. It is never retrieved for them, but "
            "they are not held out from a model trained on the bank.",
            count,
            len(queries.identities),
        )
    return count
