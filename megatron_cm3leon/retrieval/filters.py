"""Choose neighbors among candidates: search the bank by text and by image, then apply the paper's filters.

A query document is searched by its text alone and by its images alone (its views), because only one of them is known at
generation; the bank holds whole documents. The candidates are visited in the order of falling scores, from the views in
turn. A candidate is kept (CM3Leon section 2.1) if

- its score to the query document, to each view and to every kept document is at most `threshold` (0.9);
- it is not the query document itself, and none of its images is an image of the query or of a kept document.

The kept documents are then sorted by their score to the whole query document.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.common.threads import one_blas_thread
from megatron_cm3leon.retrieval.part_arrays import to_float32

NO_NEIGHBOR = -1
_CANDIDATE_BYTES = 8 << 20
"""Bytes of candidate vectors that are compared at a time: they fit into the processor's cache."""
_MAX_ALL_PAIRS = 256
"""Up to this number of candidates per document all pairs are compared at once; beyond, only pairs with kept ones."""
_GROWTH = 4

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(vectors [n, width], k) -> (scores, numbers) [n, k] of the best k documents of the bank for each vector."""


@dataclass(kw_only=True)
class Bank:
    """The arrays of the memory bank that the filters use."""

    vectors: np.ndarray
    """Unit vectors [documents, width], float16 or float32; may be a memory map."""
    identities: np.ndarray
    """uint64 [documents, P, 2]: hashes of each image's file and image tokens; 0: no image."""


@dataclass(kw_only=True)
class Queries:
    """Query documents, one per row."""

    vectors: np.ndarray
    """Unit vectors of the whole documents [n, width]."""
    identities: np.ndarray
    """uint64 [n, P, 2], as in Bank; zeros if the images are not known."""
    bank_numbers: np.ndarray
    """int64 [n]: number of the query document in the bank, -1 if the bank does not hold it."""
    views: tuple[np.ndarray, ...] = ()
    """Vectors to search with, each [n, width]; a row of zeros finds nothing. Empty: the vectors of the documents."""

    @property
    def search_vectors(self) -> tuple[np.ndarray, ...]:
        """The views, or the vectors of the documents if there are none."""
        return self.views or (self.vectors,)

    def select(self, rows: np.ndarray | slice) -> "Queries":
        """The queries of these rows."""
        return Queries(
            vectors=self.vectors[rows],
            identities=self.identities[rows],
            bank_numbers=self.bank_numbers[rows],
            views=tuple(view[rows] for view in self.views),
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
    """Neighbors int64 and scores float32, both [n, count], of `queries`; -1 and -inf if there are fewer.

    The first search returns `candidates` documents for each view. Where fewer than `count` pass the filters, it is
    repeated with four times as many, up to `max_candidates`.
    """
    limit = min(max_candidates, len(bank.vectors))
    k = min(max(candidates, count + 1), limit)
    neighbors = np.full((len(queries.vectors), count), NO_NEIGHBOR, np.int64)
    scores = np.full(neighbors.shape, -np.inf, np.float32)
    pending = np.arange(len(neighbors))
    while len(pending):
        batch = queries.select(pending)
        # A re-ranking of the candidates would follow here.
        numbers = np.stack([_search_view(search, view, k) for view in batch.search_vectors], axis=1)
        rows_at_once = max(1, _CANDIDATE_BYTES // (numbers.shape[1] * k * bank.vectors.shape[1] * 4))
        for start in range(0, len(pending), rows_at_once):
            part = slice(start, start + rows_at_once)
            found = filter_candidates(bank, batch.select(part), numbers[part], count, threshold)
            neighbors[pending[part]], scores[pending[part]] = found
        pending = pending[neighbors[pending, -1] == NO_NEIGHBOR]
        if k == limit:
            break
        k = min(k * _GROWTH, limit)
    return neighbors, scores


def _search_view(search: Search, view: np.ndarray, k: int) -> np.ndarray:
    """Candidates int64 [n, k] of one view; -1 for a row of zeros."""
    vectors = np.asarray(view, np.float32)
    numbers = search(vectors, k)[1]
    return np.where(vectors.any(axis=1, keepdims=True), numbers, NO_NEIGHBOR)


@one_blas_thread()
def filter_candidates(
    bank: Bank, queries: Queries, candidates: np.ndarray, count: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the filters to candidates int64 [n, views, k] (-1: none): neighbors and scores [n, count].

    Scores are computed again from the vectors, so that an index that approximates scores only affects which candidates
    there are; equal scores are ordered by document number.
    """
    n, views, k = candidates.shape
    numbers = candidates.reshape(n, views * k)
    view_of = np.repeat(np.arange(views), k)
    vectors = to_float32(bank.vectors[numbers.clip(0)])
    query_vectors = [queries.vectors, *queries.search_vectors]
    scores = np.matmul(vectors, np.stack([np.asarray(each, np.float32) for each in query_vectors], axis=2))
    # scores: [n, candidates, 1 + views]
    view_scores = np.take_along_axis(scores, (1 + view_of)[None, :, None], axis=2)[:, :, 0]
    identities = bank.identities[numbers.clip(0)]
    allowed = (numbers != NO_NEIGHBOR) & (scores.max(axis=2) <= threshold)
    allowed &= numbers != queries.bank_numbers[:, None]
    allowed &= ~_share_image(identities, queries.identities[:, None])
    ranks = _rank(view_scores, numbers)
    all_pairs = None
    if numbers.shape[1] <= _MAX_ALL_PAIRS:
        all_pairs = np.matmul(vectors, vectors.transpose(0, 2, 1))

    rows = np.arange(n)
    neighbors = np.full((n, count), NO_NEIGHBOR, np.int64)
    neighbor_scores = np.full(neighbors.shape, -np.inf, np.float32)
    for column in range(count):
        if not allowed.any():
            break
        # The views take turns; a candidate of another view is taken only if this view has none left.
        penalty = np.where(view_of == column % views, 0, ranks.shape[1])
        best = np.where(allowed, ranks + penalty, 2 * ranks.shape[1]).argmin(axis=1)
        found = allowed[rows, best]
        neighbors[found, column] = numbers[rows, best][found]
        neighbor_scores[found, column] = scores[rows, best, 0][found]
        if all_pairs is None:
            scores_to_best = np.matmul(vectors, vectors[rows, best][:, :, None])[:, :, 0]
        else:
            scores_to_best = all_pairs[rows, best]
        allowed &= (scores_to_best <= threshold) & (numbers != numbers[rows, best][:, None])
        allowed &= ~_share_image(identities, identities[rows, best][:, None])
    order = np.lexsort((neighbors, -neighbor_scores), axis=-1)
    return np.take_along_axis(neighbors, order, 1), np.take_along_axis(neighbor_scores, order, 1)


def _rank(scores: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Rank of each candidate by falling score, then by number; [n, candidates]."""
    order = np.lexsort((numbers, -scores), axis=-1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
    return ranks


def _share_image(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether any image of `left` [..., P, 2] is one of `right` [..., Q, 2], by its file or by its image tokens."""
    left, right = left[..., :, None, :], right[..., None, :, :]
    return ((left == right) & (left != 0)).any(axis=(-1, -2, -3))
