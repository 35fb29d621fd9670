"""From candidates to neighbours: search the bank by text and by picture, then apply the paper's filters.

A query document is searched for by its text alone and by its pictures alone (its views), as at generation only one of
them is known; the bank holds whole documents. Going through the candidates by falling score, from one view and the
other in turn, one is kept (CM3Leon section 2.1) when

- its score to the query document, to its views, and to every kept one is at most `threshold` (0.9);
- it is not the query document itself, and none of its pictures is one of the query's or of a kept one's.

A row is then put in the order of the scores to the whole query document.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.common.threads import one_blas_thread
from megatron_cm3leon.retrieval.part_arrays import to_float32

NO_NEIGHBOR = -1
_CANDIDATE_BYTES = 8 << 20
"""Candidate vectors that are compared at a time: few enough for the processor's cache."""
_LARGEST_SQUARE = 256
"""Candidates of a document up to which all are compared with all at once; beyond, only with those kept."""
_GROWTH = 4

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(vectors, k) -> (scores, numbers) of the best k of the bank for each."""


@dataclass(kw_only=True)
class Bank:
    """What the filters need of the memory bank."""

    vectors: np.ndarray
    """Unit vectors [documents, width], float16 or float32; may be a memory map."""
    identities: np.ndarray
    """uint64 [documents, P, 2]: hashes of each picture's file and image tokens; 0 where there is none."""


@dataclass(kw_only=True)
class Queries:
    """Query documents, row by row."""

    vectors: np.ndarray
    """Unit vectors of the whole documents [n, width]."""
    identities: np.ndarray
    """uint64 [n, P, 2], as in Bank; zeros where the pictures are not known."""
    own: np.ndarray
    """int64 [n]: the query's own number in the bank, -1 when it is not in it."""
    views: tuple[np.ndarray, ...] = ()
    """What is searched by, each [n, width]; a row of zeros finds nothing. Empty: the vectors themselves."""

    def rows(self, chosen) -> "Queries":
        """The queries of these rows."""
        return Queries(
            vectors=self.vectors[chosen],
            identities=self.identities[chosen],
            own=self.own[chosen],
            views=tuple(view[chosen] for view in self.views),
        )


def find_neighbors(
    search: Search,
    bank: Bank,
    queries: Queries,
    count: int,
    *,
    threshold: float = 0.9,
    candidates: int = 32,
    max_candidates: int = 4096,
) -> tuple[np.ndarray, np.ndarray]:
    """Table int64 and scores float32 [n, count] of the neighbours of `queries`.

    `search` is asked for `candidates` of each view, and for four times as many, up to `max_candidates`, where those
    left fewer than `count` after the filters.
    """
    largest = min(max_candidates, len(bank.vectors))
    wanted = min(max(candidates, count + 1), largest)
    table = np.full((len(queries.vectors), count), NO_NEIGHBOR, np.int64)
    scores = np.full(table.shape, -np.inf, np.float32)
    open_rows = np.arange(len(table))
    views = max(1, len(queries.views))
    while len(open_rows):
        asked = queries.rows(open_rows)
        # A re-ranking of the candidates would stand behind this line.
        numbers = np.stack([_search_view(search, view, wanted) for view in asked.views or (asked.vectors,)], axis=1)
        rows_at_once = max(1, _CANDIDATE_BYTES // (views * wanted * bank.vectors.shape[1] * 4))
        for start in range(0, len(open_rows), rows_at_once):
            part = slice(start, start + rows_at_once)
            found = filter_candidates(bank, asked.rows(part), numbers[part], count, threshold)
            table[open_rows[part]], scores[open_rows[part]] = found
        open_rows = open_rows[table[open_rows, -1] == NO_NEIGHBOR]
        if wanted == largest:
            break
        wanted = min(wanted * _GROWTH, largest)
    return table, scores


def _search_view(search: Search, view: np.ndarray, wanted: int) -> np.ndarray:
    vectors = np.asarray(view, np.float32)
    numbers = search(vectors, wanted)[1]
    return np.where(vectors.any(axis=1)[:, None], numbers, NO_NEIGHBOR)


@one_blas_thread()
def filter_candidates(
    bank: Bank, queries: Queries, candidates: np.ndarray, count: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the filters to candidates int64 [n, views, k] (-1: none): table and scores [n, count].

    Scores are computed again from the vectors, so that an index that approximates them changes nothing but
    which candidates there are; equal scores are ordered by document number.
    """
    n, views, k = candidates.shape
    numbers = candidates.reshape(n, views * k)
    view_of = np.repeat(np.arange(views), k)
    vectors = to_float32(bank.vectors[numbers.clip(0)])
    searched = queries.views or (queries.vectors,)
    asked = np.stack([np.asarray(view, np.float32) for view in (queries.vectors, *searched)], axis=2)
    scores = np.matmul(vectors, asked)  # [n, candidates, 1 + views]
    own_scores = np.take_along_axis(scores, (1 + view_of)[None, :, None], axis=2)[:, :, 0]
    identities = bank.identities[numbers.clip(0)]
    allowed = (numbers != NO_NEIGHBOR) & (scores.max(axis=2) <= threshold) & (numbers != queries.own[:, None])
    allowed &= ~_share_picture(identities, queries.identities[:, None])
    ranks = _rank(own_scores, numbers)
    square = None
    if numbers.shape[1] <= _LARGEST_SQUARE:
        square = np.matmul(vectors, vectors.transpose(0, 2, 1))

    rows = np.arange(n)
    table = np.full((n, count), NO_NEIGHBOR, np.int64)
    kept = np.full(table.shape, -np.inf, np.float32)
    for place in range(count):
        if not allowed.any():
            break
        turn = np.where(view_of == place % views, 0, ranks.shape[1])  # the other view's where this one has none left
        best = np.where(allowed, ranks + turn, 2 * ranks.shape[1]).argmin(axis=1)
        found = allowed[rows, best]
        table[found, place] = numbers[rows, best][found]
        kept[found, place] = scores[rows, best, 0][found]
        taken = vectors[rows, best][:, :, None]
        between = np.matmul(vectors, taken)[:, :, 0] if square is None else square[rows, best]
        allowed &= (between <= threshold) & (numbers != numbers[rows, best][:, None])
        allowed &= ~_share_picture(identities, identities[rows, best][:, None])
    order = np.lexsort((table, -kept), axis=-1)
    return np.take_along_axis(table, order, 1), np.take_along_axis(kept, order, 1)


def _rank(scores: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Place of each candidate by falling score, then by number; [n, candidates]."""
    order = np.lexsort((numbers, -scores), axis=-1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
    return ranks


def _share_picture(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Is any picture of `left` [..., P, 2] one of `right` [..., Q, 2], by its file or by its image tokens?"""
    left, right = left[..., :, None, :], right[..., None, :, :]
    return ((left == right) & (left != 0)).any(axis=(-1, -2, -3))
