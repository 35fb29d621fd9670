"""Sampling: guidance, contrastive decoding, temperature, top-k, top-p, and the draw of the next token.

Two samplers turn logits into a token (random numbers: noise.py):

gumbel-1   argmax of logits / temperature + Gumbel noise, one number per vocabulary id: a sample of the softmax
           (Gumbel-max). Neither a sort nor a cumulative sum, and a small change of the logits mostly keeps the token.
inverse-1  the cumulative distribution over ids in their order, inverted at one uniform number per token.

Both are keyed by the seed and the sequence's own prompt, never by its position in the batch: the same seed and prompt
give the same tokens whatever is generated beside them. Results of before there was a choice are of inverse-1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLERS = ("gumbel-1", "inverse-1")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy: always the most likely token, whatever top_k, top_p and the seed."""
    top_k: int = 0
    """Only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Only the most likely tokens whose probabilities together reach it; 1 keeps all."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1 is none."""
    contrast_k: int = 0
    """Contrastive decoding CD-K instead of guidance: the k whose probability bounds what may be drawn; 0 is none."""
    contrast_alpha: float = 0.5
    """Tokens stay whose conditional probability reaches this share of the k-th largest one; 0 keeps all."""
    sampler: str = SAMPLERS[0]
    """How chance becomes a token: gumbel-1 or inverse-1. Another sampler gives another image for the same seed."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature ({self.temperature}) must be a finite number, 0 (greedy) or above.")
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must be 0 (all tokens) or above.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1 (all tokens).")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance ({self.guidance}) must be 0 or above; 1 is no guidance.")
        if self.contrast_k < 0:
            raise ValueError(f"contrast_k ({self.contrast_k}) must be 0 (no contrastive decoding) or above.")
        if not 0 <= self.contrast_alpha <= 1:
            raise ValueError(f"contrast_alpha ({self.contrast_alpha}) must be between 0 (all tokens) and 1.")
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"sampler ({self.sampler!r}) must be one of: {', '.join(SAMPLERS)}; results without a sampler in their "
                f"generated.json are of inverse-1."
            )
        if self.contrast_k and self.guidance != 1:
            raise ValueError(
                f"guidance ({self.guidance}) and contrast_k ({self.contrast_k}) both contrast with the prompt "
                f"without its condition; give one of them (guidance 1 is none)."
            )

    @property
    def contrasted(self) -> bool:
        """Whether a second stream, of prompts without the condition, is needed."""
        return self.guidance != 1 or self.contrast_k > 0


def default_guidance(contrast_k: int) -> float:
    """Guidance of pictures where none is given: none beside CD-K, which replaces it."""
    return 1.0 if contrast_k else 2.0


def contrast(conditional: Tensor, unconditional: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] to draw from, of both streams' logits."""
    if sampling.contrast_k:
        return apply_contrast(conditional, unconditional, sampling.contrast_k, sampling.contrast_alpha)
    return apply_guidance(conditional, unconditional, sampling.guidance)


def apply_guidance(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """l = l_uncond + weight x (l_cond - l_uncond) (CM3Leon section 3.1)."""
    return torch.lerp(unconditional, conditional, weight)


def apply_contrast(conditional: Tensor, unconditional: Tensor, k: int, alpha: float) -> Tensor:
    """CD-K: log p_cond - log p_uncond where p_cond reaches alpha x the k-th largest p_cond, else -inf (section 3.1)."""
    expert, amateur = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    score = expert - amateur
    if alpha == 0:
        return score
    bound = expert.topk(min(k, expert.shape[-1]), dim=-1).values[..., -1:] + math.log(alpha)
    return score.masked_fill(expert < bound, float("-inf"))


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """-inf for all but the `top_k` largest of each row; ties with the k-th stay."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def filter_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """0 for all but the most likely ones, down to and with the one that brings their sum to `top_p`."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return probabilities.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), 0.0)


def draw(logits: Tensor, sampling: Sampling, chance: Tensor | None) -> Tensor:
    """Index [B] of the next token among logits [B, V].

    `chance` is Gumbel noise [B, V] (gumbel-1) or a uniform number [B] in [0, 1) (inverse-1); greedy needs none.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = filter_top_k(logits / sampling.temperature, sampling.top_k)
    if sampling.sampler == "inverse-1":
        return _invert(filter_top_p(logits.softmax(-1), sampling.top_p), chance)
    if sampling.top_p < 1:
        logits = logits.masked_fill(filter_top_p(logits.softmax(-1), sampling.top_p) == 0, float("-inf"))
    return (logits + chance).argmax(-1)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True steps over tokens of probability 0, whose cumulative value equals the one before them.
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
