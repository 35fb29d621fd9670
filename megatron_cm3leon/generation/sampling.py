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

    @property
    def log_alpha(self) -> float:
        """What is added to the k-th largest log p_cond for the bound of CD-K."""
        return math.log(self.contrast_alpha) if self.contrast_alpha else -math.inf

    @property
    def structure(self) -> tuple:
        """What decides which operations a draw consists of; only numbers differ between draws of one structure."""
        greedy, bounded = self.temperature == 0, self.contrast_alpha > 0
        return self.sampler, greedy, self.contrasted, self.contrast_k, bounded, self.top_k, self.top_p < 1


class Scalars:
    """The numbers of a Sampling as fp32 scalars on a device: a captured step reads them there."""

    NAMES = ("temperature", "top_p", "guidance", "log_alpha")

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(self.NAMES), device=device)
        self.temperature, self.top_p, self.guidance, self.log_alpha = self.values.unbind()

    def copy(self, sampling: Sampling) -> None:
        """Take a Sampling's numbers."""
        self.values.copy_(torch.tensor([getattr(sampling, name) for name in self.NAMES]))


def default_guidance(contrast_k: int) -> float:
    """Guidance of pictures where none is given: none beside CD-K, which replaces it."""
    return 1.0 if contrast_k else 2.0


def contrast(
    conditional: Tensor, unconditional: Tensor, sampling: Sampling, scalars: Scalars | Sampling | None = None
) -> Tensor:
    """Logits [B, V] to draw from, of both streams' logits. `scalars` give the numbers, `sampling` else."""
    scalars = scalars or sampling
    if sampling.contrast_k:
        bound = scalars.log_alpha if sampling.contrast_alpha else None
        return apply_contrast(conditional, unconditional, sampling.contrast_k, bound)
    return apply_guidance(conditional, unconditional, scalars.guidance)


def apply_guidance(conditional: Tensor, unconditional: Tensor, weight: float | Tensor) -> Tensor:
    """l = l_uncond + weight x (l_cond - l_uncond) (CM3Leon section 3.1)."""
    return torch.lerp(unconditional, conditional, weight)


def apply_contrast(conditional: Tensor, unconditional: Tensor, k: int, log_alpha: float | Tensor | None) -> Tensor:
    """CD-K: log p_cond - log p_uncond where p_cond reaches alpha x the k-th largest p_cond, else -inf (section 3.1).

    Without `log_alpha` (alpha is 0) no token is excluded.
    """
    expert, amateur = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    score = expert - amateur
    if log_alpha is None:
        return score
    bound = expert.topk(min(k, expert.shape[-1]), dim=-1).values[..., -1:] + log_alpha
    return score.masked_fill(expert < bound, float("-inf"))


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """-inf for all but the `top_k` largest of each row; ties with the k-th stay."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def filter_top_p(probabilities: Tensor, top_p: float | Tensor) -> Tensor:
    """0 for all but the most likely ones, down to and with the one that brings their sum to `top_p`."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return probabilities.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), 0.0)


def score(
    logits: Tensor, sampling: Sampling, noise: Tensor | None, scalars: Scalars | Sampling | None = None
) -> Tensor:
    """Values [B, V] whose largest is the token of gumbel-1, with `noise` [B, V], or of greedy decoding, without."""
    if sampling.temperature == 0:
        return logits
    scalars = scalars or sampling
    logits = filter_top_k(logits / scalars.temperature, sampling.top_k)
    if sampling.top_p < 1:
        logits = logits.masked_fill(filter_top_p(logits.softmax(-1), scalars.top_p) == 0, float("-inf"))
    return logits + noise


def draw(
    logits: Tensor, sampling: Sampling, chance: Tensor | None, scalars: Scalars | Sampling | None = None
) -> Tensor:
    """Index [B] of the next token among logits [B, V].

    `chance` is Gumbel noise [B, V] (gumbel-1) or a uniform number [B] in [0, 1) (inverse-1); greedy needs none.
    """
    if sampling.sampler == "gumbel-1" or sampling.temperature == 0:
        return score(logits, sampling, chance, scalars).argmax(-1)
    scalars = scalars or sampling
    probabilities = filter_top_k(logits / scalars.temperature, sampling.top_k).softmax(-1)
    if sampling.top_p < 1:
        probabilities = filter_top_p(probabilities, scalars.top_p)
    return _invert(probabilities, chance)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True steps over tokens of probability 0, whose cumulative value equals the one before them.
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
