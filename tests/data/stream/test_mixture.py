"""Mixtures are exact to one sample at every step, for any weights."""

import numpy as np
import pytest

from megatron_cm3leon.data.stream.mixture import (
    MAX_CYCLE,
    Mixture,
    build_cycle,
    compute_integer_weights,
    plan_mixture,
)


@pytest.mark.parametrize("weights", [[1], [7, 2, 1], [0.5, 0.25, 0.125, 0.125], [13, 11, 3, 2, 2, 1, 1], [1, 1000, 30]])
def test_the_share_of_every_source_is_exact_to_one_sample(weights):
    mixture = Mixture(weights)
    numbers = np.arange(3 * mixture.length)
    sources, local_numbers = mixture.split(numbers)
    for source, weight in enumerate(weights):
        selected = sources == source
        share = (numbers + 1) * weight / sum(weights)
        assert np.abs(np.cumsum(selected) - share).max() < 1
        assert local_numbers[selected].tolist() == list(range(selected.sum()))


def test_splitting_a_single_sample_equals_splitting_all():
    mixture = Mixture([0.6, 0.3, 0.1])
    sources, local_numbers = mixture.split(np.arange(100))
    assert mixture.split(np.array([57])) == (sources[57], local_numbers[57])
    far = 10**15 + 4
    source, number = mixture.split(np.array([far]))
    assert abs(number[0] - far * [0.6, 0.3, 0.1][source[0]]) <= 1


def test_weights_are_read_as_decimals():
    assert compute_integer_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert compute_integer_weights([30.0, 20.0]) == [3, 2]
    assert build_cycle([1]).tolist() == [0]
    with pytest.raises(
        ValueError, match=r"the weights of data.sources \(0.123457, 0.876543\) repeat only after 1000000"
    ):
        compute_integer_weights([0.123457, 0.876543])


def check_plan(plan, documents):
    assert np.allclose([count / number for count, number in zip(plan.samples, documents, strict=True)], plan.limited)
    assert sum(plan.weights) <= MAX_CYCLE and np.allclose(plan.shares, np.array(plan.weights) / sum(plan.weights))


def test_shares_are_limited_by_the_ratio_of_samples_to_documents():
    """By hand: equal shares of 900, 90 and 10 documents are ratios of .370, 3.70 and 33.3, limited to .370, 3, 3."""
    documents = [900, 90, 10]
    plan = plan_mixture(documents, [0, 0, 0], alpha=0, cap=0, lowest=0.3, highest=3)
    assert np.allclose(plan.ratios, [1000 / 2700, 1000 / 270, 1000 / 30])
    assert plan.samples == [333, 270, 30] and plan.error == 0
    assert plan.weights == [111, 90, 10] and np.allclose(plan.limited, [0.37, 3, 3])
    check_plan(plan, documents)
    proportional = plan_mixture(documents, [0, 0, 0], alpha=1, cap=0, lowest=0.3, highest=3)
    assert proportional.weights == [90, 9, 1] and proportional.limited == [1, 1, 1]
    capped = plan_mixture(documents, [0, 0, 0], alpha=1, cap=90, lowest=0, highest=100)
    assert capped.weights == [9, 9, 1] and np.allclose(capped.samples, np.array([9, 9, 1]) * 1000 / 19)
    squared = plan_mixture([4, 2], [0, 0], alpha=2, cap=0, lowest=0.5, highest=9)
    assert (
        np.allclose(squared.ratios, [1.2, 0.6])
        and np.allclose(squared.samples, [4.8, 1.2])
        and squared.weights == [4, 1]
    )


def test_given_shares_are_kept_and_the_others_have_the_rest():
    plan = plan_mixture([300, 100, 100], [0.5, 0, 0], alpha=1, cap=0, lowest=0.3, highest=3)
    assert np.allclose(plan.shares, [0.5, 0.25, 0.25]) and plan.weights == [2, 1, 1]
    both = plan_mixture([300, 100], [0.1, 0.9], alpha=1, cap=0, lowest=0.3, highest=3)
    assert np.allclose(both.ratios, [400 * 0.1 / 300, 3.6])
    assert both.samples == [90, 300] and np.allclose(both.limited, [0.3, 3])


def test_many_documents_are_rounded_to_a_cycle_with_the_stated_error():
    documents = [5_000_003, 700_001, 30_011, 4_001, 90_001]
    for alpha in (0, 0.5, 1):
        plan = plan_mixture(documents, [0] * 5, alpha, cap=0, lowest=0.3, highest=3)
        check_plan(plan, documents)
        limited = np.clip(plan.ratios, 0.3, 3)
        exact = limited * documents / (limited * documents).sum()
        assert 0 < np.abs(np.array(plan.shares) - exact).max() < plan.error == 5 / MAX_CYCLE
        assert max(plan.limited) <= 3  # rounding does not exceed the limit
        assert plan == plan_mixture(documents, [0] * 5, alpha, cap=0, lowest=0.3, highest=3)


def test_a_source_whose_share_is_too_small_is_named():
    with pytest.raises(
        ValueError, match=r"data.sources\[1\] has 10 of 10000010 documents.*below the smallest one, 1/65"
    ):
        plan_mixture([10_000_000, 10], [0, 0], alpha=0, cap=0, lowest=0.3, highest=3)
