"""Each filter on vectors written by hand, and all of them compared with a plain loop."""

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


def apply_filters(bank_vectors, *, bank_images=None, image=(0, 0), query_number=-1, count=2, threshold=0.9):
    """Neighbors of the query (1, 0) as a list."""
    vectors = np.asarray(bank_vectors, np.float32)
    identities = np.array(bank_images or [(n + 1, n + 1) for n in range(len(vectors))], np.uint64)[:, None]
    index = build_index(vectors, "Flat")
    table, scores = find_neighbors(
        lambda part, k: search_index(index, part, k),
        Bank(vectors=vectors, identities=identities),
        Queries(
            vectors=np.array([[1, 0]], np.float32),
            identities=np.array([[image]], np.uint64),
            bank_numbers=np.array([query_number]),
        ),
        count,
        threshold=threshold,
    )
    assert ((table == -1) == np.isneginf(scores)).all()
    return table[0].tolist()


def test_the_best_score_is_first():
    assert apply_filters(on_circle(0.1, 0.7, 0.5)) == [1, 2]


def test_a_score_above_the_threshold_is_filtered():
    assert apply_filters(on_circle(0.95, 0.5, 0.2)) == [1, 2]
    assert apply_filters(on_circle(0.95, 0.5, 0.2), threshold=0.96) == [0, 1]


def test_a_score_equal_to_the_threshold_is_kept():
    assert apply_filters([[0.5, np.sqrt(0.75)]], count=1, threshold=0.5) == [0]


def test_only_one_of_two_too_similar_neighbors_is_kept():
    same_side = np.array([[0.8, 0.6], [0.78, np.sqrt(1 - 0.78**2)], [0.1, -np.sqrt(0.99)]])
    assert apply_filters(same_side) == [0, 2]
    assert apply_filters(same_side, threshold=1.0) == [0, 1]


def test_a_document_is_never_its_own_neighbor():
    assert apply_filters(on_circle(0.8, 0.5, 0.2), query_number=0) == [1, 2]


def test_the_image_of_the_query_is_never_retrieved():
    vectors = on_circle(0.8, 0.5, 0.2)
    same_file, same_tokens = [(7, 1), (8, 2), (9, 3)], [(1, 5), (2, 6), (3, 4)]
    assert apply_filters(vectors, bank_images=same_file, image=(7, 99)) == [1, 2]
    assert apply_filters(vectors, bank_images=same_tokens, image=(99, 6)) == [0, 2]


def test_an_image_is_retrieved_once():
    vectors = on_circle(0.8, 0.5, 0.2)
    assert apply_filters(vectors, bank_images=[(7, 1), (7, 2), (9, 3)]) == [0, 2]
    assert apply_filters(vectors, bank_images=[(7, 1), (8, 1), (9, 3)]) == [0, 2]


def test_documents_without_an_image_do_not_count_as_one_image():
    assert apply_filters(on_circle(0.8, 0.5), bank_images=[(0, 0), (0, 0)], image=(0, 0)) == [0, 1]


def test_missing_neighbors_are_minus_one():
    assert apply_filters(on_circle(0.95, 0.5), count=3) == [1, -1, -1]
    assert apply_filters(on_circle(0.95), count=1) == [-1]


def test_equal_scores_are_ordered_by_number():
    assert apply_filters([[0.6, 0.8], [0.6, -0.8]]) == [0, 1]


def test_more_candidates_are_searched_until_enough_pass_the_filters():
    """The 300 nearest are above the threshold; the search must go beyond them."""
    vectors = np.concatenate([on_circle(*np.linspace(0.99, 0.91, 300)), on_circle(0.5, 0.4)])
    assert apply_filters(vectors, count=2) == [300, 301]


def brute_force(vectors, identities, queries, query_identities, query_number, count, threshold):
    """The filters in plain Python."""
    table = np.full((len(queries), count), -1)
    for row, query in enumerate(queries):
        kept = []
        for number in sorted(range(len(vectors)), key=lambda n: (-(vectors[n] @ query), n)):
            images = [query_identities[row], *(identities[other] for other in kept)]
            if (
                len(kept) < count
                and number != query_number[row]
                and vectors[number] @ query <= threshold
                and all(vectors[number] @ vectors[other] <= threshold for other in kept)
                and not any((identities[number] == image).any() for image in images)
            ):
                kept.append(number)
        table[row, : len(kept)] = kept
    return table


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_table_equals_brute_force(dtype):
    random = np.random.default_rng(0)
    vectors = np.repeat(random.normal(size=(60, 8)), 5, axis=0) + 0.25 * random.normal(size=(300, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)
    identities = random.integers(1, 200, (300, 1, 2)).astype(np.uint64)
    query_number = np.arange(300)
    index = build_index(vectors, "Flat")
    table, scores = find_neighbors(
        lambda part, k: search_index(index, part, k),
        Bank(vectors=vectors, identities=identities),
        Queries(vectors=vectors, identities=identities, bank_numbers=query_number),
        6,
        candidates=8,
    )
    wide = vectors.astype(np.float32)
    expected = brute_force(wide, identities, wide, identities, query_number, 6, 0.9)
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


def test_text_and_image_find_candidates_alternately():
    """Four documents near the text, four near the image: the best two of each, ordered by the score of the pair."""
    random = np.random.default_rng(2)
    text, image = np.eye(8, dtype=np.float32)[:2]
    near = [view + 0.6 * random.normal(size=8) for view in (text,) * 4 + (image,) * 4]
    vectors = np.array([vector / np.linalg.norm(vector) for vector in near], np.float32)
    pair = (text + image) / 2**0.5
    queries = Queries(
        vectors=pair[None],
        identities=np.zeros((1, 1, 2), np.uint64),
        bank_numbers=np.array([-1]),
        views=(text[None], image[None]),
    )
    index = build_index(vectors, "Flat")
    bank = Bank(vectors=vectors, identities=np.arange(1, 17, dtype=np.uint64).reshape(-1, 1, 2))
    table, scores = find_neighbors(lambda part, k: search_index(index, part, k), bank, queries, 4, threshold=1.0)
    by_text, by_image = np.argsort(-vectors @ text), np.argsort(-vectors @ image)
    expected = [*by_text[:1]]
    for view, count in ((by_image, 2), (by_text, 3), (by_image, 4)):
        expected += [number for number in view if number not in expected][: count - len(expected)]
    assert sorted(table[0]) == sorted(expected)
    assert (np.diff(scores[0]) <= 0).all()
    np.testing.assert_allclose(scores[0], vectors[table[0]] @ pair, rtol=1e-5)
    text_only = Queries(
        vectors=queries.vectors,
        identities=queries.identities,
        bank_numbers=queries.bank_numbers,
        views=(text[None], 0 * text[None]),
    )
    table, _ = find_neighbors(lambda part, k: search_index(index, part, k), bank, text_only, 4, threshold=1.0)
    assert sorted(table[0]) == sorted(by_text[:4])


def test_documents_of_several_images_share_none():
    vectors = on_circle(0.8, 0.5, 0.2)
    images = np.array([[(1, 1), (2, 2)], [(3, 3), (0, 0)], [(2, 9), (4, 4)]], np.uint64)
    index = build_index(vectors, "Flat")

    def find(query_images):
        queries = Queries(
            vectors=np.array([[1, 0]], np.float32),
            identities=np.array([query_images], np.uint64),
            bank_numbers=np.array([-1]),
        )
        bank = Bank(vectors=vectors, identities=images)
        return find_neighbors(lambda part, k: search_index(index, part, k), bank, queries, 2)[0][0].tolist()

    assert find([(9, 8), (0, 0)]) == [0, 1]  # 2 shares an image with 0
    assert find([(8, 2), (0, 0)]) == [1, 2]  # the second image of 0 is that of the query


def test_many_candidates_are_filtered_like_few(monkeypatch):
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
