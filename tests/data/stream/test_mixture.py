"""Mixtures are exact to one sample at every step, for any weights."""

import numpy as np
import pytest

from megatron_cm3leon.data.stream.mixture import Mixture, build_cycle, compute_integer_weights


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
