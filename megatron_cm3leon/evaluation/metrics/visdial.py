"""Metrics of Visual Dialog: the rank of the true answer among the candidates, and NDCG by dense relevance.

Source: `visdialch/metrics.py` of github.com/batra-mlp-lab/visdial-challenge-starter-pytorch; Das et al., arXiv
1611.08669. Of candidates with equal scores the first is ranked first.
"""

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)


def rank_candidates(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rank of each candidate, int64 [candidates], 1 for the highest score; ValueError unless all are finite."""
    values = np.asarray(scores, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite numbers.")
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks


def measure_rank(rank: int) -> dict[str, float]:
    """`mrr`, `r@1`, `r@5`, `r@10` and `mean_rank` of one round, from the rank of its true answer."""
    return {"mrr": 1 / rank} | {f"r@{k}": float(rank <= k) for k in RECALLS} | {"mean_rank": float(rank)}


def measure_ndcg(ranks: Sequence[int] | np.ndarray, relevance: Sequence[float] | np.ndarray) -> float:
    """Normalized discounted cumulative gain, 0 to 1, of one round.

    Over the k best-ranked candidates, k being the number of candidates with a relevance: the sum of
    relevance / log2(1 + rank), divided by the same of the ideal order. ValueError for another number of relevances, for
    ones below 0, and if no candidate has a relevance.
    """
    ranks, gains = np.asarray(ranks), np.asarray(relevance, np.float64)
    if len(ranks) != len(gains):
        raise ValueError(f"there are {len(gains)} relevances for {len(ranks)} candidates; give one for each.")
    if not (np.isfinite(gains).all() and (gains >= 0).all() and gains.any()):
        raise ValueError("relevances must be finite numbers of 0 or above, at least one of them above 0.")
    k = int((gains != 0).sum())
    discounts = np.log2(np.arange(k) + 2)
    found = (gains[np.argsort(ranks, kind="stable")[:k]] / discounts).sum()
    return float(found / (np.sort(gains)[::-1][:k] / discounts).sum())
