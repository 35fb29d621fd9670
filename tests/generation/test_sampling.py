"""Sampling compared with values by hand: guidance, contrast, temperature, top-k, top-p, both samplers."""

import math

import pytest
import torch

from megatron_cm3leon.generation.noise import GumbelNoise, philox_key, uniform_numbers
from megatron_cm3leon.generation.sampling import (
    Sampling,
    apply_contrast,
    apply_guidance,
    draw_tokens,
    filter_top_k,
    filter_top_p,
)

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def draw_inverse(*uniforms, **fields):
    """Tokens that inverse-1 draws with these uniform numbers."""
    logits = PROBABILITIES.log().expand(len(uniforms), -1)
    uniform = torch.tensor(uniforms, dtype=torch.float64)
    return draw_tokens(logits, Sampling(sampler="inverse-1", **fields), uniform).tolist()


def draw_gumbel(logits, count, **fields):
    """Tokens that gumbel-1 draws at `count` positions of one sequence."""
    keys = torch.tensor([philox_key(3, [1, 2])])
    noise = GumbelNoise(torch.arange(logits.shape[-1]))(keys, torch.arange(count))[:, 0]
    return draw_tokens(logits.expand(count, -1), Sampling(**fields), noise)


def test_guidance_by_hand():
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
        score = apply_contrast(conditional, unconditional, k, math.log(0.4))[0].exp().tolist()
        assert score == pytest.approx(ratios[:kept] + [0.0] * (4 - kept), abs=1e-6)
    assert apply_contrast(conditional, unconditional, 1, 0.0)[0].isfinite().tolist() == [True, False, False, False]


def test_contrast_of_all_tokens_without_a_bound_is_the_ratio():
    generator = torch.Generator().manual_seed(3)
    conditional, unconditional = torch.randn(2, 5, 40, generator=generator)
    plain = conditional.log_softmax(-1) - unconditional.log_softmax(-1)
    assert torch.equal(apply_contrast(conditional, unconditional, 40, None), plain)
    assert torch.equal(apply_contrast(conditional, unconditional, 1, None), plain)
    one_kept = apply_contrast(conditional, unconditional, 1, 0.0)  # contrastive decoding becomes greedy
    assert one_kept.argmax(-1).tolist() == conditional.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2, 3]), (0.95, [0, 1, 2, 3]), (0.8, [1, 2, 3]), (0.6, [1, 3]), (0.3, [1]), (1e-9, [1])],
)
def test_top_p_by_hand(top_p, kept):
    assert filter_top_p(PROBABILITIES, top_p)[0].nonzero()[:, 0].tolist() == kept


def test_top_k_by_hand():
    logits = PROBABILITIES.log()
    assert torch.isfinite(filter_top_k(logits, 2))[0].tolist() == [False, True, False, True]
    assert filter_top_k(logits, 0) is logits and filter_top_k(logits, 9) is logits


def test_draw_inverts_the_cumulative_distribution():
    assert draw_inverse(0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.999999) == [0, 0, 1, 1, 2, 2, 3, 3]
    # tokens 1 and 3 stay, with 4/7 and 3/7
    assert draw_inverse(0.0, 0.57, 0.58, 1 - 2**-53, top_p=0.6) == [1, 1, 3, 3]
    assert draw_inverse(0.0, 0.5, 1 - 2**-53, top_k=1) == [1, 1, 1]


def test_temperature_by_hand():
    # at 0.5 probabilities are squared: 1 16 4 9 of 30
    bounds = [1 / 30, 17 / 30, 21 / 30]
    for number, bound in enumerate(bounds):
        assert draw_inverse(bound - 1e-4, bound + 1e-4, temperature=0.5) == [number, number + 1]
    assert draw_inverse(0.0, 0.5, 0.99, temperature=0) == [1, 1, 1]
    assert draw_inverse(0.99, temperature=0, top_p=0.5, top_k=3) == [1]


def test_inverse_frequencies_follow_the_probabilities():
    uniform = torch.from_numpy(uniform_numbers(1, [1, 2], 20_000))
    counts = (
        draw_tokens(PROBABILITIES.log().expand(20_000, -1), Sampling(sampler="inverse-1"), uniform).bincount() / 20_000
    )
    assert (counts - PROBABILITIES[0]).abs().max() < 0.012


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.02, 0.1, 0.4, 0.2, 0.25, 0.03]),
        ({"temperature": 0.5}, [0.0004, 0.01, 0.16, 0.04, 0.0625, 0.0009]),
        ({"top_k": 3}, [0, 0, 0.4, 0.2, 0.25, 0]),
        ({"top_p": 0.6}, [0, 0, 0.4, 0, 0.25, 0]),
    ],
)
def test_gumbel_frequencies_follow_the_softmax(fields, expected):
    logits = torch.tensor([[0.02, 0.1, 0.4, 0.2, 0.25, 0.03]]).log() + 2
    expected = torch.tensor(expected) / sum(expected)
    counts = draw_gumbel(logits, 30_000, **fields).bincount(minlength=6)
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], 30_000 * expected[expected > 0]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    bound = {1: 10.8, 2: 13.8, 5: 20.5}  # 0.1 %, by degrees of freedom
    assert chi_square < bound[len(counts) - 1]


def test_greedy_sampling_is_deterministic():
    logits = torch.tensor([[0.1, 3.0, 0.2], [5.0, 0.0, 1.0]])
    for sampler in ("gumbel-1", "inverse-1"):
        assert draw_tokens(logits, Sampling(temperature=0, sampler=sampler), None).tolist() == [1, 0]


def test_the_same_noise_mostly_gives_the_same_token_after_a_small_change_of_the_logits():
    """Exact speculative decoding depends on it; here entropy is 8.8 bits, total variation 0.09 and 0.18."""
    generator = torch.Generator().manual_seed(0)
    before = 1.5 * torch.randn(1, 2048, generator=generator)
    uniform = torch.from_numpy(uniform_numbers(1, [1], 400))
    for change, at_least in ((0.2, 0.85), (0.5, 0.69)):
        after = before + change * torch.randn(1, 2048, generator=generator)
        inverse = [draw_tokens(x.expand(400, -1), Sampling(sampler="inverse-1"), uniform) for x in (before, after)]
        gumbel = [draw_gumbel(x, 400) for x in (before, after)]
        kept = [float((one[0] == one[1]).float().mean()) for one in (gumbel, inverse)]
        assert kept[0] > at_least and kept[1] < 0.4, kept


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
        ({"sampler": "gumbel"}, r"sampler \('gumbel'\) must be one of: gumbel-1, inverse-1; results without a sampler"),
        ({"contrast_k": 2, "guidance": 2.0}, r"guidance \(2.0\) and contrast_k \(2\) both contrast"),
    ],
)
def test_invalid_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
