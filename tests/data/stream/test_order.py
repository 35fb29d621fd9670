"""Permutations are bijections and draws are uniform; both depend only on the key and the position."""

import numpy as np
import pytest

from megatron_cm3leon.data.stream.order import derive_key, draw_integers, draw_uniform, permute, poisson_table


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permute_is_a_bijection_and_gives_the_same_for_single_positions(count):
    permuted = permute(np.arange(count), count, 99)
    assert sorted(permuted.tolist()) == list(range(count))
    for position in {0, count // 2, count - 1}:
        assert permute(position, count, 99).tolist() == [permuted[position]]


def test_permutations_of_other_keys_differ_and_look_shuffled():
    first, second = permute(np.arange(10_000), 10_000, 1), permute(np.arange(10_000), 10_000, 2)
    assert (first == second).mean() < 0.001
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05


def test_every_document_occurs_at_every_position_of_a_small_epoch():
    seen = np.zeros((7, 7))
    for epoch in range(2000):
        seen[np.arange(7), permute(np.arange(7), 7, derive_key(1, "order", epoch))] += 1
    assert np.abs(seen / 2000 - 1 / 7).max() < 0.04


def test_positions_of_large_counts_are_permuted_directly():
    positions = permute(np.arange(5), 340_000_000, 5)
    assert len(set(positions.tolist())) == 5 and (positions < 340_000_000).all()


def test_draws_are_uniform_and_depend_on_every_counter():
    draws = draw_uniform(derive_key(0, "test"), np.arange(1000)[:, None], np.arange(50))
    assert draws.mean() == pytest.approx(0.5, abs=0.01) and draws.var() == pytest.approx(1 / 12, abs=0.003)
    assert len(np.unique(draws)) == draws.size
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.01
    assert draw_uniform(derive_key(0, "test"), 700, 31)[0] == draws[700, 31]
    assert derive_key(0, "a", "bc") != derive_key(0, "ab", "c")


def test_integers_and_poisson_have_the_expected_distributions():
    counts = np.bincount(draw_integers(3, 4, np.arange(40_000)))
    assert len(counts) == 4 and np.abs(counts / 40_000 - 0.25).max() < 0.01
    assert poisson_table(0.0).tolist() == [1.0]
    for mean in (0.5, 1.0, 900.0):
        draws = np.searchsorted(poisson_table(mean), draw_uniform(5, np.arange(20_000)), "right")
        assert draws.mean() == pytest.approx(mean, rel=0.03) and draws.var() == pytest.approx(mean, rel=0.05)
