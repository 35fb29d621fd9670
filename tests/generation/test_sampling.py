"""Sampling by hand: guidance, temperature, top-k, top-p, and noise that belongs to a sequence."""

import math

import pytest
import torch

from megatron_cm3leon.generation.sampling import (
    Sampling,
    apply_contrast,
    apply_guidance,
    draw,
    filter_top_k,
    filter_top_p,
    uniform_numbers,
)

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def chosen(sampling, *uniforms):
    logits = PROBABILITIES.log().expand(len(uniforms), -1)
    return draw(logits, sampling, torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_guidance():
    conditional, unconditional = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert apply_guidance(conditional, unconditional, 3.0).tolist() == [[4.0, -2.0]]
    assert apply_guidance(conditional, unconditional, 1.0).tolist() == [[2.0, 0.0]]
    assert apply_guidance(conditional, unconditional, 0.0).tolist() == [[1.0, 1.0]]


def test_contrast_by_hand():
    conditional = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log() + 3  # a shift of logits changes nothing
    unconditional = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log() - 1
    ratios = [5 / 7, 2.5, 1.5, 1.0]
    # k = 1, alpha = 0.4: at least 0.2. k = 2: at least 0.1. k = 4 (or more): at least 0.04.
    for k, kept in [(1, 2), (2, 4), (4, 4), (9, 4)]:
        score = apply_contrast(conditional, unconditional, k, 0.4)[0].exp().tolist()
        assert score == pytest.approx(ratios[:kept] + [0.0] * (4 - kept), abs=1e-6)
    assert apply_contrast(conditional, unconditional, 1, 1.0)[0].isfinite().tolist() == [True, False, False, False]


def test_contrast_of_all_tokens_without_a_bound_is_the_ratio_alone():
    generator = torch.Generator().manual_seed(3)
    conditional, unconditional = torch.randn(2, 5, 40, generator=generator)
    plain = conditional.log_softmax(-1) - unconditional.log_softmax(-1)
    assert torch.equal(apply_contrast(conditional, unconditional, 40, 0.0), plain)
    assert torch.equal(apply_contrast(conditional, unconditional, 1, 0.0), plain)
    one_kept = apply_contrast(conditional, unconditional, 1, 1.0)  # contrastive decoding's collapse to greedy
    assert one_kept.argmax(-1).tolist() == conditional.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2, 3]), (0.95, [0, 1, 2, 3]), (0.8, [1, 2, 3]), (0.6, [1, 3]), (0.3, [1]), (1e-9, [1])],
)
def test_top_p(top_p, kept):
    assert filter_top_p(PROBABILITIES, top_p)[0].nonzero()[:, 0].tolist() == kept


def test_top_k():
    logits = PROBABILITIES.log()
    assert torch.isfinite(filter_top_k(logits, 2))[0].tolist() == [False, True, False, True]
    assert filter_top_k(logits, 0) is logits and filter_top_k(logits, 9) is logits


def test_draw_inverts_the_cumulative_distribution():
    assert chosen(Sampling(), 0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.999999) == [0, 0, 1, 1, 2, 2, 3, 3]
    # tokens 1 and 3 stay, with 4/7 and 3/7
    assert chosen(Sampling(top_p=0.6), 0.0, 0.57, 0.58, 1 - 2**-53) == [1, 1, 3, 3]
    assert chosen(Sampling(top_k=1), 0.0, 0.5, 1 - 2**-53) == [1, 1, 1]


def test_temperature():
    # at 0.5 probabilities are squared: 1 16 4 9 of 30
    bounds = [1 / 30, 17 / 30, 21 / 30]
    for number, bound in enumerate(bounds):
        assert chosen(Sampling(temperature=0.5), bound - 1e-4, bound + 1e-4) == [number, number + 1]
    assert chosen(Sampling(temperature=0), 0.0, 0.5, 0.99) == [1, 1, 1]
    assert chosen(Sampling(temperature=0, top_p=0.5, top_k=3), 0.99) == [1]


def test_frequencies_follow_the_probabilities():
    uniform = torch.from_numpy(uniform_numbers(1, [1, 2], 20_000))
    counts = draw(PROBABILITIES.log().expand(20_000, -1), Sampling(), uniform).bincount() / 20_000
    assert (counts - PROBABILITIES[0]).abs().max() < 0.012


def test_noise_depends_on_seed_and_prompt_alone():
    first = uniform_numbers(7, [1, 2, 3], 5)
    assert (first == uniform_numbers(7, [1, 2, 3], 9)[:5]).all()
    assert (first != uniform_numbers(8, [1, 2, 3], 5)).all()
    assert (first != uniform_numbers(7, [1, 2, 4], 5)).all()
    assert ((first >= 0) & (first < 1)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\) must be a finite number, 0 \(greedy\) or above"),
        ({"temperature": math.nan}, r"temperature \(nan\)"),
        ({"top_p": 0}, r"top_p \(0\) must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p \(1.5\)"),
        ({"top_k": -1}, r"top_k \(-1\) must be 0"),
        ({"guidance": -1}, r"guidance \(-1\) must be 0 or above; 1 is no guidance"),
        ({"contrast_k": -1}, r"contrast_k \(-1\) must be 0 \(no contrastive decoding\) or above"),
        ({"contrast_alpha": 1.5}, r"contrast_alpha \(1.5\) must be between 0"),
        ({"contrast_k": 2, "guidance": 2.0}, r"guidance \(2.0\) and contrast_k \(2\) both contrast"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
