"""Small matrix products use one thread, give identical results, and restore the number of threads."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from megatron_cm3leon.common.threads import SMALL_MODEL, one_blas_thread, one_thread_if_small
from megatron_cm3leon.evaluation import judge
from megatron_cm3leon.retrieval import filters


def count_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def two_threads():
    with threadpool_limits(2, user_api="blas"):
        yield


def test_one_blas_thread_restores_the_number_of_threads(two_threads):
    with one_blas_thread():
        assert count_threads() == {1}
    assert count_threads() == {2}
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert count_threads() == {2}


def filter_random_candidates(count, width, k):
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(500 + 3 * count, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    identities = np.arange(2, 1002, dtype=np.uint64).reshape(500, 1, 2)
    one, two, three = np.split(vectors[500:], 3)
    queries = filters.Queries(
        vectors=one, identities=np.zeros((count, 1, 2), np.uint64), bank_numbers=np.arange(count), views=(two, three)
    )
    bank = filters.Bank(vectors=vectors[:500], identities=identities)
    return filters.filter_candidates(bank, queries, draw.integers(0, 500, (count, 2, k)), 8, 0.9)


def test_the_filters_of_the_neighbor_table_use_one_thread_and_give_identical_results(two_threads, monkeypatch):
    seen, product = [], np.matmul
    monkeypatch.setattr(filters.np, "matmul", lambda *factors: (seen.append(count_threads()), product(*factors))[1])
    functions = [filters.filter_candidates.__wrapped__, filters.filter_candidates]
    for k in (128, 200):  # all pairs are compared at once, and only pairs with kept candidates
        results = []
        for function in functions:
            monkeypatch.setattr(filters, "filter_candidates", function)
            seen.clear()
            results.append(filter_random_candidates(3, 512, k))
            assert seen and set(map(tuple, seen)) == {(2,) if function is functions[0] else (1,)}
        for one, two in zip(*results, strict=True):
            assert np.array_equal(one, two)


def test_a_checker_uses_one_thread(two_threads):
    checker = SimpleNamespace(classify=lambda image: {"threads": count_threads()})
    assert judge.judge_images(checker, [None], [{"threads": {1}}]) == [{"threads": [{1}, {1}, True]}]


@pytest.fixture
def two_torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_small_model_on_the_cpu_uses_one_thread(two_torch_threads):
    small, large = torch.nn.Linear(8, 8), torch.nn.Linear(SMALL_MODEL, 1, device="meta")
    for model, expected in ((small, 1), (large, 2), (torch.nn.Linear(8, 8, device="meta"), 2)):
        with pytest.raises(KeyError), one_thread_if_small(model):
            assert torch.get_num_threads() == expected
            raise KeyError
        assert torch.get_num_threads() == 2
