"""The filters one by one on hand-made vectors, and all of them against a plain loop."""

import numpy as np
import pytest

pytest.importorskip("faiss")

from megatron_cm3leon.retrieval import filters
from megatron_cm3leon.retrieval.filters import Bank, Queries, find_neighbors
from megatron_cm3leon.retrieval.index import build_index, search_index


def on_circle(*cosines: float) -> np.ndarray:
    """Unit vectors in the plane whose inner product with (1, 0) is given, on alternating sides of it."""
    signs = np.resize([1, -1], len(cosines))
    cosines = np.array(cosines)
    return np.stack([cosines, signs * np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)


def apply_filters(bank_vectors, *, bank_images=None, image=(0, 0), own=-1, count=2, threshold=0.9):
    """Neighbours of the query (1, 0) as a list."""
    vectors = np.asarray(bank_vectors, np.float32)
    identities = np.array(bank_images or [(n + 1, n + 1) for n in range(len(vectors))], np.uint64)[:, None]
    index = build_index(vectors, "Flat")
    table, scores = find_neighbors(
        lambda part, k: search_index(index, part, k),
        Bank(vectors=vectors, identities=identities),
        Queries(
            vectors=np.array([[1, 0]], np.float32),
            identities=np.array([[image]], np.uint64),
            bank_numbers=np.array([own]),
        ),
        count,
        threshold=threshold,
    )
    assert ((table == -1) == np.isneginf(scores)).all()
    return table[0].tolist()


def test_best_score_comes_first():
    assert apply_filters(on_circle(0.1, 0.7, 0.5)) == [1, 2]


def test_a_score_above_the_threshold_is_too_similar():
    assert apply_filters(on_circle(0.95, 0.5, 0.2)) == [1, 2]
    assert apply_filters(on_circle(0.95, 0.5, 0.2), threshold=0.96) == [0, 1]


def test_a_score_equal_to_the_threshold_stays():
    assert apply_filters([[0.5, np.sqrt(0.75)]], count=1, threshold=0.5) == [0]


def test_neighbours_too_similar_to_each_other_are_not_both_taken():
    same_side = np.array([[0.8, 0.6], [0.78, np.sqrt(1 - 0.78**2)], [0.1, -np.sqrt(0.99)]])
    assert apply_filters(same_side) == [0, 2]
    assert apply_filters(same_side, threshold=1.0) == [0, 1]


def test_a_document_is_never_its_own_neighbour():
    assert apply_filters(on_circle(0.8, 0.5, 0.2), own=0) == [1, 2]


def test_the_query_picture_is_never_retrieved_whatever_its_score():
    vectors = on_circle(0.8, 0.5, 0.2)
    same_file, same_tokens = [(7, 1), (8, 2), (9, 3)], [(1, 5), (2, 6), (3, 4)]
    assert apply_filters(vectors, bank_images=same_file, image=(7, 99)) == [1, 2]
    assert apply_filters(vectors, bank_images=same_tokens, image=(99, 6)) == [0, 2]


def test_one_picture_is_retrieved_once():
    vectors = on_circle(0.8, 0.5, 0.2)
    assert apply_filters(vectors, bank_images=[(7, 1), (7, 2), (9, 3)]) == [0, 2]
    assert apply_filters(vectors, bank_images=[(7, 1), (8, 1), (9, 3)]) == [0, 2]


def test_documents_without_a_picture_are_not_one_picture():
    assert apply_filters(on_circle(0.8, 0.5), bank_images=[(0, 0), (0, 0)], image=(0, 0)) == [0, 1]


def test_too_few_neighbours_leave_minus_one():
    assert apply_filters(on_circle(0.95, 0.5), count=3) == [1, -1, -1]
    assert apply_filters(on_circle(0.95), count=1) == [-1]


def test_equal_scores_are_ordered_by_number():
    assert apply_filters([[0.6, 0.8], [0.6, -0.8]]) == [0, 1]


def test_candidates_grow_until_the_filters_leave_enough():
    """The 300 nearest are above the threshold; the search must go beyond them."""
    vectors = np.concatenate([on_circle(*np.linspace(0.99, 0.91, 300)), on_circle(0.5, 0.4)])
    assert apply_filters(vectors, count=2) == [300, 301]


def brute_force(vectors, identities, queries, query_identities, own, count, threshold):
    """The filters as one reads them."""
    table = np.full((len(queries), count), -1)
    for row, query in enumerate(queries):
        kept = []
        for number in sorted(range(len(vectors)), key=lambda n: (-(vectors[n] @ query), n)):
            pictures = [query_identities[row], *(identities[other] for other in kept)]
            if (
                len(kept) < count
                and number != own[row]
                and vectors[number] @ query <= threshold
                and all(vectors[number] @ vectors[other] <= threshold for other in kept)
                and not any((identities[number] == picture).any() for picture in pictures)
            ):
                kept.append(number)
        table[row, : len(kept)] = kept
    return table


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_table_equals_brute_force(dtype):
    random = np.random.default_rng(0)
    vectors = np.repeat(random.normal(size=(60, 8)), 5, axis=0) + 0.25 * random.normal(size=(300, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)
    identities = random.integers(1, 200, (300, 1, 2)).astype(np.uint64)
    own = np.arange(300)
    index = build_index(vectors, "Flat")
    table, scores = find_neighbors(
        lambda part, k: search_index(index, part, k),
        Bank(vectors=vectors, identities=identities),
        Queries(vectors=vectors, identities=identities, bank_numbers=own),
        6,
        candidates=8,
    )
    wide = vectors.astype(np.float32)
    expected = brute_force(wide, identities, wide, identities, own, 6, 0.9)
    assert (table == expected).all()
    assert (table >= 0).mean() > 0.9
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", wide, wide[table]), rtol=1e-5, atol=1e-6)


def test_the_result_does_not_depend_on_batches():
    random = np.random.default_rng(1)
    vectors = random.normal(size=(200, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    identities = np.arange(1, 401, dtype=np.uint64).reshape(-1, 1, 2)
    index = build_index(vectors, "Flat")
    bank = Bank(vectors=vectors, identities=identities)
    queries = Queries(vectors=vectors, identities=identities, bank_numbers=np.arange(200))

    def find(chosen):
        return find_neighbors(lambda part, k: search_index(index, part, k), bank, queries.select(chosen), 4)[0]

    pieces = [find(np.arange(start, min(start + 7, 200))) for start in range(0, 200, 7)]
    assert (find(np.arange(200)) == np.concatenate(pieces)).all()


def test_text_and_picture_find_candidates_in_turn():
    """Four documents near the text, four near the picture: the best two of each, put in the order of the whole."""
    random = np.random.default_rng(2)
    text, picture = np.eye(8, dtype=np.float32)[:2]
    near = [view + 0.6 * random.normal(size=8) for view in (text,) * 4 + (picture,) * 4]
    vectors = np.array([vector / np.linalg.norm(vector) for vector in near], np.float32)
    whole = (text + picture) / 2**0.5
    queries = Queries(
        vectors=whole[None],
        identities=np.zeros((1, 1, 2), np.uint64),
        bank_numbers=np.array([-1]),
        views=(text[None], picture[None]),
    )
    index = build_index(vectors, "Flat")
    bank = Bank(vectors=vectors, identities=np.arange(1, 17, dtype=np.uint64).reshape(-1, 1, 2))
    table, scores = find_neighbors(lambda part, k: search_index(index, part, k), bank, queries, 4, threshold=1.0)
    by_text, by_picture = np.argsort(-vectors @ text), np.argsort(-vectors @ picture)
    expected = [*by_text[:1]]
    for view, wanted in ((by_picture, 2), (by_text, 3), (by_picture, 4)):
        expected += [number for number in view if number not in expected][: wanted - len(expected)]
    assert sorted(table[0]) == sorted(expected)
    assert (np.diff(scores[0]) <= 0).all()
    np.testing.assert_allclose(scores[0], vectors[table[0]] @ whole, rtol=1e-5)
    blind = Queries(
        vectors=queries.vectors,
        identities=queries.identities,
        bank_numbers=queries.bank_numbers,
        views=(text[None], 0 * text[None]),
    )
    table, _ = find_neighbors(lambda part, k: search_index(index, part, k), bank, blind, 4, threshold=1.0)
    assert sorted(table[0]) == sorted(by_text[:4])


def test_documents_of_several_pictures_share_none():
    vectors = on_circle(0.8, 0.5, 0.2)
    pictures = np.array([[(1, 1), (2, 2)], [(3, 3), (0, 0)], [(2, 9), (4, 4)]], np.uint64)
    index = build_index(vectors, "Flat")

    def find(own_pictures):
        queries = Queries(
            vectors=np.array([[1, 0]], np.float32),
            identities=np.array([own_pictures], np.uint64),
            bank_numbers=np.array([-1]),
        )
        bank = Bank(vectors=vectors, identities=pictures)
        return find_neighbors(lambda part, k: search_index(index, part, k), bank, queries, 2)[0][0].tolist()

    assert find([(9, 8), (0, 0)]) == [0, 1]  # 2 shares a picture with 0
    assert find([(8, 2), (0, 0)]) == [1, 2]  # 0 has the query's picture second


def test_many_candidates_are_filtered_as_few_are(monkeypatch):
    random = np.random.default_rng(3)
    vectors = random.normal(size=(150, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    identities = np.arange(1, 301, dtype=np.uint64).reshape(-1, 1, 2)
    queries = Queries(vectors=vectors, identities=identities, bank_numbers=np.arange(150))
    every = np.tile(np.arange(150), (150, 1, 1))
    few = filters.filter_candidates(Bank(vectors=vectors, identities=identities), queries, every, 5, 0.7)
    monkeypatch.setattr(filters, "_MAX_ALL_PAIRS", 0)
    many = filters.filter_candidates(Bank(vectors=vectors, identities=identities), queries, every, 5, 0.7)
    assert (few[0] == many[0]).all() and (few[0] >= 0).all()
