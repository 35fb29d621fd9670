"""CM3 masking: exact tokens of hand-written sequences, and the statistics of the random draws."""

import numpy as np
import pytest

from megatron_cm3leon.config.schema import CM3Config
from megatron_cm3leon.data.stream.cm3 import (
    SpanSampler,
    apply_spans,
    choose_part,
    choose_segment,
    choose_spans,
    cut_source,
    find_delimiters,
    mask_sequence,
)
from tests.data.corpora import make_vocabulary

V = make_vocabulary(text=50, image=20, height=2, width=2)
EOS, BREAK, PAD, EOSS = V.eos, V.break_id, V.pad, V.eoss
S0, S1 = V.sentinel(0), V.sentinel(1)
IMAGE = [V.image_start + code for code in (1, 2, 3, 4)]
SAMPLE = [EOS, 10, 11, 12, BREAK, *IMAGE, EOS]  # text at 1..3, <break> at 4, image at 5..8


def apply(source, spans, length, weights=None):
    tokens, out = np.full(length, PAD), np.zeros(length, np.float32)
    weights = np.ones(len(source)) if weights is None else np.array(weights)
    filled = apply_spans(np.array(source), weights, spans, V, tokens, out)
    return tokens.tolist(), out.tolist(), filled


def mask(source, length, spans, uniforms, cut, rotated=False, infilled=False, query_start=1):
    tokens, weights = np.full(length, PAD), np.zeros(length, np.float32)
    trimmed, filled = mask_sequence(
        np.array(source), np.ones(len(source)), query_start, spans, rotated, infilled, uniforms, V, cut, tokens, weights
    )
    assert (weights > 0).sum() == filled
    return tokens.tolist(), weights.tolist(), trimmed


def test_a_span_moves_to_the_end_after_its_sentinel():
    tokens, weights, filled = apply(SAMPLE, [(2, 4)], 14)
    assert tokens == [EOS, 10, S0, BREAK, *IMAGE, EOS, S0, 11, 12, EOSS, PAD]
    assert weights == [1.0] * 13 + [0.0] and filled == 13


def test_two_spans_are_numbered_from_left_to_right():
    tokens, _, _ = apply(SAMPLE, [(1, 2), (6, 9)], 16)
    expected = [EOS, S0, 11, 12, BREAK, IMAGE[0], S1, EOS, S0, 10, EOSS, S1, *IMAGE[1:], EOSS]
    assert tokens == expected


def test_sentinels_take_the_weight_of_their_span():
    tokens, weights, _ = apply(SAMPLE, [(1, 3), (6, 8)], 16, [0.1] * 5 + [1.0] * 5)
    expected = {S0: 0.1, S1: 1.0}
    for token, weight in zip(tokens, weights, strict=True):
        assert token not in expected or weight == pytest.approx(expected[token])
    assert [weight for token, weight in zip(tokens, weights, strict=True) if token == EOSS] == pytest.approx([0.1, 1])


def test_moving_the_entire_text_gives_the_prompt_of_captioning():
    delimiters = find_delimiters(np.array(SAMPLE), V)
    assert delimiters == [0, 4, 9]
    assert choose_segment(delimiters, 1, 0.0) == [(1, 4)]
    assert choose_segment(delimiters, 1, 0.99) == [(5, 9)]
    assert choose_segment(delimiters, 5, 0.0) == [(5, 9)]
    assert choose_segment([0, 1], 1, 0.5) == []
    tokens, _, trimmed = mask(SAMPLE, 13, 1, [0.0], "head", rotated=True)
    assert tokens == [EOS, S0, BREAK, *IMAGE, EOS, S0, 10, 11, 12, EOSS] and trimmed == 0


@pytest.mark.parametrize(
    "segment, uniforms, expected",
    [
        ((1, 4), [0.0, 0.0, 0.99, 0.0], (3, 4)),  # the last of three words
        ((1, 4), [0.6, 0.0, 0.0, 0.0], (1, 3)),  # 1 + int(0.36 * 3) words
        ((1, 4), [0.99, 0.0, 0.5, 0.0], (1, 4)),
        ((5, 9), [0.0, 0.0, 0.99, 0.0], (7, 8)),  # one code of the second row
        ((5, 9), [0.5, 0.0, 0.0, 0.99], (6, 9)),  # the second column: from the end of one row to that of the next
        ((5, 9), [0.99, 0.99, 0.99, 0.99], (5, 9)),
        ((5, 8), [0.0, 0.99, 0.99, 0.0], (7, 8)),  # not a complete image: as a text
    ],
)
def test_infilling_hides_words_or_what_a_box_of_the_image_spans(segment, uniforms, expected):
    assert choose_part(np.array(SAMPLE), [segment], uniforms, V) == [expected]


def test_a_part_of_the_query_moves_as_infilling_prompts_hide_it():
    source = [EOS, 20, BREAK, *IMAGE, BREAK, 10, 11, 12, BREAK, *IMAGE, EOS]
    part = {"infilled": True, "query_start": 8}
    tokens, _, trimmed = mask(source, 20, 1, [0.0, 0.0, 0.0, 0.5, 0.0], "head", **part)
    assert tokens == [EOS, *source[1:9], S0, 12, BREAK, *IMAGE, EOS, S0, 11, EOSS] and trimmed == 0
    tokens, _, trimmed = mask(source, 19, 1, [0.9, 0.0, 0.9, 0.99, 0.0], "head", **part)
    assert tokens == [EOS, *source[2:12], *IMAGE[:2], S0, EOS, S0, *IMAGE[2:], EOSS] and trimmed == 1
    tokens, _, trimmed = mask([EOS, 10, 11], 6, 1, [0.0] * 5, "head", infilled=True)
    assert tokens == [EOS, 10, 11, PAD, PAD, PAD] and trimmed == 0, "no complete segment"


def test_a_span_is_two_sorted_uniforms_and_never_contains_the_first_token():
    assert choose_spans(10, [], 1, [0.7, 0.2]) == [(3, 8)]
    assert choose_spans(10, [], 1, [0.0, 0.999]) == [(1, 10)]
    assert choose_spans(10, [], 1, [0.5, 0.55]) == [], "an empty span is dropped"


@pytest.mark.parametrize(
    "span, expected",
    [
        ((2, 7), (2, 4)),  # two tokens of each segment: the first one is chosen
        ((1, 6), (1, 4)),
        ((3, 9), (5, 9)),
        ((4, 5), None),  # <break> alone
        ((9, 10), None),  # </s> alone
    ],
)
def test_a_span_is_clipped_to_the_segment_it_overlaps_most(span, expected):
    uniforms = [(span[0] - 0.5) / 10, (span[1] - 0.5) / 10]
    assert choose_spans(10, [0, 4, 9], 1, uniforms) == ([expected] if expected else [])


def test_disjoint_candidates_are_kept_in_the_order_of_drawing():
    at = lambda *positions: [(position - 0.5) / 100 for position in positions]  # noqa: E731
    candidates = at(10, 20, 15, 30, 20, 25, 5, 8, 50, 60)
    assert choose_spans(100, [], 2, candidates) == [(10, 20), (20, 25)]
    assert choose_spans(100, [], 5, candidates) == [(5, 8), (10, 20), (20, 25), (50, 60)]


def test_added_tokens_trim_the_tail_for_stream_and_the_head_after_eos_for_query():
    assert cut_source(np.arange(9), 6, "tail").tolist() == [0, 1, 2, 3, 4, 5]
    assert cut_source(np.arange(9), 6, "head").tolist() == [0, 4, 5, 6, 7, 8]
    source = [EOS, 1, 2, 3, 4, 5, 6, BREAK, 20, 21, BREAK, *IMAGE, EOS]
    uniforms = [(7 - 0.5) / 13, (9 - 0.5) / 13]
    tokens, _, trimmed = mask(source, 16, 1, uniforms, "tail")
    assert tokens == [*source[:7], BREAK, S0, 21, BREAK, *IMAGE[:2], S0, 20, EOSS] and trimmed == 3
    tokens, _, trimmed = mask(source, 16, 1, uniforms, "head")
    assert tokens == [EOS, 4, 5, 6, BREAK, 20, 21, BREAK, S0, *IMAGE[1:], EOS, S0, IMAGE[0], EOSS]
    assert trimmed == 3


def test_spans_that_are_not_found_trim_no_tokens():
    source = [EOS, 1, 2, 3, 4, 5, 6, BREAK, 20, 21, BREAK, *IMAGE, EOS]
    tokens, _, trimmed = mask(source, 16, 1, [0.5, 0.5], "head")
    assert (tokens, trimmed) == (source, 0)
    tokens, _, trimmed = mask(source, 16, 2, [(8 - 0.5) / 10, (9 - 0.5) / 10, *[0.5, 0.5] * 3], "head")
    assert tokens[:8] == [EOS, 4, 5, 6, BREAK, 20, 21, BREAK] and trimmed == 3
    assert tokens[8:] == [*IMAGE[:3], S0, EOS, S0, IMAGE[3], EOSS]


def test_the_number_of_spans_is_a_clamped_poisson():
    config = CM3Config(mean_spans=1.0, max_spans=2)
    draws = SpanSampler(config, 7, 16).draw(np.arange(40_000))
    shares = np.bincount(draws.spans) / 40_000
    expected = [np.exp(-1), np.exp(-1), 1 - 2 * np.exp(-1)]
    assert np.abs(shares - expected).max() < 0.01
    assert all(len(row) == (0, 2, 8)[count] for row, count in zip(draws.uniforms, draws.spans, strict=True))


def test_probabilities_of_masking_and_rotation():
    config = CM3Config(probability=0.5, mean_spans=5.0, rotation_probability=0.25)
    draws = SpanSampler(config, 7, 16).draw(np.arange(20_000))
    assert (draws.spans > 0).mean() == pytest.approx(0.5, abs=0.02)
    assert draws.rotated.mean() == pytest.approx(0.125, abs=0.01)
    assert (draws.spans[draws.rotated] == 1).all()
    for off in (CM3Config(probability=0.0), CM3Config(max_spans=0, rotation_probability=1.0)):
        draws = SpanSampler(off, 7, 16).draw(np.arange(100))
        assert not draws.spans.any() and not draws.rotated.any()


def test_probabilities_of_infilling_and_of_dropped_documents():
    options = {"probability": 0.5, "min_spans": 1, "rotation_probability": 0.25}
    before = SpanSampler(CM3Config(**options), 7, 16).draw(np.arange(4_000))
    config = CM3Config(**options, infill_probability=0.5, drop_documents_probability=0.5)
    draws = SpanSampler(config, 7, 16).draw(np.arange(4_000))
    assert draws.infilled.mean() == pytest.approx(0.25, abs=0.03) and not before.infilled.any()
    assert (draws.rotated == before.rotated).all() and ((draws.spans > 0) == (before.spans > 0)).all()
    assert {(int(n), len(row)) for n, row in zip(draws.spans, draws.uniforms, strict=True) if len(row) == 5} == {(1, 5)}
    assert sum(len(row) == 5 for row in draws.uniforms) == draws.infilled.sum()
    assert draws.without_documents[draws.spans > 0].mean() == pytest.approx(0.5, abs=0.04)
    assert not draws.without_documents[draws.spans == 0].any() and not before.without_documents.any()


def test_draws_depend_only_on_the_sequence_number():
    sampler = SpanSampler(CM3Config(mean_spans=3.0), 7, 16)
    all_draws, one = sampler.draw(np.arange(100)), sampler.draw(np.array([57]))
    assert one.spans[0] == all_draws.spans[57] and one.uniforms[0] == all_draws.uniforms[57]


def test_span_ends_are_uniform_over_the_source():
    sampler = SpanSampler(CM3Config(mean_spans=1.0, max_spans=1), 3, 16)
    draws = sampler.draw(np.arange(20_000))
    spans = [span for row in draws.uniforms if row for span in choose_spans(1000, [], 1, row)]
    lengths = np.array([end - start for start, end in spans])
    assert lengths.mean() == pytest.approx(1000 / 3, rel=0.03)
    assert min(start for start, _ in spans) >= 1 and max(end for _, end in spans) <= 1000


@pytest.mark.parametrize("max_spans", [16, 256])
def test_cm3_and_incoder_have_at_least_one_span(max_spans):
    """CM3 (2201.07520, A.1) clamps Poisson(1) to [1, 16], InCoder (2204.05999) to [1, 256]."""
    sampler = SpanSampler(CM3Config(min_spans=1, max_spans=max_spans), 7, 512)
    shares = np.bincount(sampler.draw(np.arange(40_000)).spans) / 40_000
    assert shares[0] == 0 and shares[1] == pytest.approx(2 * np.exp(-1), abs=0.01)
    assert shares[2] == pytest.approx(np.exp(-1) / 2, abs=0.01)
    many = SpanSampler(CM3Config(min_spans=1, max_spans=max_spans, mean_spans=1000.0), 7, 512).draw(np.arange(50))
    assert (many.spans == max_spans).all()


def test_the_share_of_unmasked_sequences_in_cm3leon_follows_the_distribution():
    """CM3Leon: Poisson(1) in [0, 511]; the mean is 1, and 1/e of the sequences are not masked."""
    spans = SpanSampler(CM3Config(), 11, 512).draw(np.arange(100_000)).spans
    expected = np.exp(-1) / np.array([1, 1, 2, 6, 24, 120])
    assert np.abs(np.bincount(spans, minlength=6)[:6] / 100_000 - expected).max() < 0.005
    assert spans.mean() == pytest.approx(1, abs=0.02)
