"""Ranks, recall and NDCG of VisDial, computed by hand."""

import math

import pytest

from megatron_cm3leon.evaluation.metrics.visdial import measure_ndcg, measure_rank, rank_candidates


def test_ranks_begin_with_the_highest_score_and_ties_keep_their_order():
    assert rank_candidates([-3.0, -1.0, -2.0, -1.0]).tolist() == [4, 1, 3, 2]
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        rank_candidates([0.0, math.nan])


def test_metrics_of_a_rank():
    assert measure_rank(4) == {"mrr": 0.25, "r@1": 0, "r@5": 1, "r@10": 1, "mean_rank": 4}
    assert measure_rank(1)["r@1"] == 1 and measure_rank(11)["r@10"] == 0


def test_ndcg_counts_as_many_candidates_as_are_relevant():
    # Two relevant ones: the model's first two are candidates 2 (irrelevant) and 0; candidate 1, third, does not count.
    found = measure_ndcg([2, 3, 1], [0.5, 1.0, 0.0])
    assert found == pytest.approx((0.5 / math.log2(3)) / (1.0 + 0.5 / math.log2(3)))
    assert measure_ndcg([2, 1, 3], [0.5, 1.0, 0.0]) == pytest.approx(1)
    assert measure_ndcg([2, 3, 1], [1.0, 0.0, 0.0]) == 0


@pytest.mark.parametrize("relevance", [[0.0, 0.0], [-1.0, 1.0], [math.nan, 1.0], [1.0]])
def test_relevance_that_cannot_be_used(relevance):
    with pytest.raises(ValueError, match=r"relevances must be finite|there are 1 relevances for 2 candidates"):
        measure_ndcg([1, 2], relevance)
