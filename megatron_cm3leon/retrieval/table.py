"""Writing the neighbour table of an index folder, in parts that an interrupted run or several tasks finish."""

import logging
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.data.neighbors import CHECKSUMS
from megatron_cm3leon.retrieval.filters import NO_NEIGHBOR, Bank, Queries, find_neighbors
from megatron_cm3leon.retrieval.index import search_index
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.retrieval.part_arrays import Rows

logger = logging.getLogger(__name__)

PART_NEIGHBORS = 65536
"""Documents of a part of the table."""
TABLE_FILES = ("table.json", "neighbors.npy", CHECKSUMS, "scores.npy")
_QUERY_BATCH = 1024


def open_table(folder: Path, documents: int, options: IndexOptions, settings: dict) -> Rows:
    """The arrays neighbors and scores; `settings` says which queries are searched in which index."""
    chosen = {
        "neighbors": options.neighbors,
        "threshold": options.threshold,
        "candidates": options.candidates,
        "max_candidates": options.max_candidates,
    }
    return Rows(folder, "table", ["neighbors", "scores"], documents, PART_NEIGHBORS, {**settings, **chosen})


def write_table(rows: Rows, parts: list[int], index, bank: Bank, queries: Queries, options: IndexOptions) -> None:
    """Find the neighbours of some parts' documents."""
    with meter(sum(len(rows.range(part)) for part in parts), "neighbours", "documents") as progress:
        for part in parts:
            pieces, numbers = [], rows.range(part)
            for start in range(numbers.start, numbers.stop, _QUERY_BATCH):
                found = find_neighbors(
                    lambda vectors, count: search_index(index, vectors, count),
                    bank,
                    queries.rows(slice(start, min(start + _QUERY_BATCH, numbers.stop))),
                    options.neighbors,
                    threshold=options.threshold,
                    candidates=options.candidates,
                    max_candidates=options.max_candidates,
                )
                pieces.append(found)
                progress.advance(len(found[0]))
            table, scores = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
            rows.write(part, {"neighbors": table, "scores": scores})


def count_neighbors(table: np.ndarray) -> list[int]:
    """How many documents have 0, 1, ... M neighbours."""
    found = np.zeros(table.shape[1] + 1, np.int64)
    for start in range(0, len(table), PART_NEIGHBORS):
        kept = (table[start : start + PART_NEIGHBORS] != NO_NEIGHBOR).sum(axis=1)
        found += np.bincount(kept, minlength=len(found))
    return found.tolist()


def count_shared_pictures(queries: Queries, bank: Bank) -> int:
    """Query documents with a picture that the bank holds too; told, as held-out ones should have none."""
    known = np.unique(queries.identities)
    pieces = [
        bank.identities[start : start + PART_NEIGHBORS] for start in range(0, len(bank.identities), PART_NEIGHBORS)
    ]
    shared = np.unique(np.concatenate([np.intersect1d(piece, known) for piece in pieces]))
    count = int(np.isin(queries.identities, shared[shared != 0]).any(axis=(1, 2)).sum())
    if count:
        logger.warning(
            "%d of %d documents have a picture that the memory bank holds too. It is never retrieved for them, but "
            "they are not held out from a model trained on the bank.",
            count,
            len(queries.identities),
        )
    return count
