"""Sampling: guidance, contrastive decoding, temperature, top-k, top-p, and the draw of the next token.

Two samplers turn logits into a token (random numbers: noise.py):

gumbel-1   argmax of logits / temperature + Gumbel noise, one number per vocabulary id: a sample of the softmax
           (Gumbel-max). It needs neither a sort nor a cumulative sum, and a small change of the logits mostly keeps
           the token.
inverse-1  the inverse of the cumulative distribution over the ids, at one uniform number per token.

Both are keyed by the seed and the sequence's own prompt, never by its position in the batch: the same seed and prompt
give the same tokens, whatever else is in the batch. Results from before there was a choice are of inverse-1.

Shapes: B sequences, V vocabulary ids that may be drawn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral

import torch
from torch import Tensor

SAMPLERS = ("gumbel-1", "inverse-1")


def _bounds(is_valid: Callable[..., bool], requirement: str) -> dict:
    """Metadata of a field: which values are valid, and the requirement in words."""
    return {"is_valid": is_valid, "requirement": requirement}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of sampling; ValueError for a value out of bounds."""

    temperature: float = field(
        default=1.0,
        metadata=_bounds(lambda value: 0 <= value < math.inf, "must be a finite number, 0 (greedy) or above"),
    )
    """Logits are divided by it; 0 is greedy: the most likely token, whatever top_k, top_p and the seed."""
    top_k: int = field(default=0, metadata=_bounds(lambda value: value >= 0, "must be 0 (all tokens) or above"))
    """Draw among the k most likely tokens; 0 keeps all."""
    top_p: float = field(
        default=1.0, metadata=_bounds(lambda value: 0 < value <= 1, "must be above 0 and at most 1 (all tokens)")
    )
    """Draw among the most likely tokens whose probabilities sum to this; 1 keeps all."""
    guidance: float = field(
        default=1.0, metadata=_bounds(lambda value: 0 <= value < math.inf, "must be 0 or above; 1 is no guidance")
    )
    """Weight of classifier-free guidance (CM3Leon section 3.1); 1 is none."""
    contrast_k: int = field(
        default=0, metadata=_bounds(lambda value: value >= 0, "must be 0 (no contrastive decoding) or above")
    )
    """Contrastive decoding CD-K instead of guidance: the rank k of the token whose probability sets the bound."""
    contrast_alpha: float = field(
        default=0.5, metadata=_bounds(lambda value: 0 <= value <= 1, "must be between 0 (all tokens) and 1")
    )
    """CD-K keeps tokens whose conditional probability is at least this share of the k-th largest; 0 keeps all."""
    sampler: str = field(
        default=SAMPLERS[0],
        metadata=_bounds(
            lambda value: value in SAMPLERS,
            f"must be one of: {', '.join(SAMPLERS)}; results without a sampler in their generated.json are of "
            f"inverse-1",
        ),
    )
    """gumbel-1 or inverse-1; they give different images for the same seed."""
    seed: int = field(default=0, metadata=_bounds(lambda value: isinstance(value, Integral), "must be a whole number"))
    """The same seed gives the same tokens for a prompt."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """ValueError for a value out of bounds, and for guidance together with contrast_k."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not one.metadata["is_valid"](value):
                raise ValueError(f"{one.name} ({value!r}) {one.metadata['requirement']}.")
        if self.contrast_k and self.guidance != 1:
            raise ValueError(
                f"guidance ({self.guidance}) and contrast_k ({self.contrast_k}) both contrast with the prompt "
                f"without its condition; give one of them (guidance 1 is none)."
            )

    @property
    def needs_unconditional(self) -> bool:
        """Whether a second stream, of prompts without the condition, is decoded, too."""
        return self.guidance != 1 or self.contrast_k > 0

    @property
    def log_alpha(self) -> float:
        """The bound of CD-K minus the k-th largest log probability."""
        return math.log(self.contrast_alpha) if self.contrast_alpha else -math.inf

    @property
    def structure(self) -> tuple:
        """The settings that decide which operations a draw consists of; the others are data."""
        greedy, bounded = self.temperature == 0, self.contrast_alpha > 0
        return self.sampler, greedy, self.needs_unconditional, self.contrast_k, bounded, self.top_k, self.top_p < 1


IMAGE_SAMPLING = Sampling(temperature=0.7, guidance=2.0)
"""Default for images of captions."""
TEXT_SAMPLING = Sampling(temperature=0.0)
"""Default for text: greedy."""


def default_guidance(contrast_k: int) -> float:
    """Guidance of images of captions unless it is set: 2, and 1 (none) with CD-K, which replaces it."""
    return 1.0 if contrast_k else IMAGE_SAMPLING.guidance


class Scalars:
    """The numbers of a Sampling as fp32 scalars on a device, from where a CUDA graph reads them."""

    NAMES = ("temperature", "top_p", "guidance", "log_alpha")

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(self.NAMES), device=device)
        self.temperature, self.top_p, self.guidance, self.log_alpha = self.values.unbind()

    def load(self, sampling: Sampling) -> None:
        """Copy a Sampling's numbers to the device."""
        self.values.copy_(torch.tensor([getattr(sampling, name) for name in self.NAMES]))


def combine_streams(
    conditional: Tensor, unconditional: Tensor, sampling: Sampling, scalars: Scalars | Sampling | None = None
) -> Tensor:
    """Logits [B, V] to draw from, by guidance or CD-K, from both streams' logits [B, V].

    `scalars` are the sampling's numbers on the device; by default those of `sampling`.
    """
    numbers = scalars or sampling
    if sampling.contrast_k:
        log_alpha = numbers.log_alpha if sampling.contrast_alpha else None
        return apply_contrast(conditional, unconditional, sampling.contrast_k, log_alpha)
    return apply_guidance(conditional, unconditional, numbers.guidance)


def apply_guidance(conditional: Tensor, unconditional: Tensor, weight: float | Tensor) -> Tensor:
    """l = l_uncond + weight x (l_cond - l_uncond) (CM3Leon section 3.1)."""
    return torch.lerp(unconditional, conditional, weight)


def apply_contrast(conditional: Tensor, unconditional: Tensor, k: int, log_alpha: float | Tensor | None) -> Tensor:
    """CD-K (CM3Leon section 3.1): log p_cond - log p_uncond if p_cond >= alpha x the k-th largest p_cond, else -inf.

    With `log_alpha` None (alpha 0) no token is excluded.
    """
    expert, amateur = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    ratio = expert - amateur
    if log_alpha is None:
        return ratio
    bound = expert.topk(min(k, expert.shape[-1]), dim=-1).values[..., -1:] + log_alpha
    return ratio.masked_fill(expert < bound, float("-inf"))


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """-inf for all but the `top_k` largest of each row; ties with the k-th are kept."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def filter_top_p(probabilities: Tensor, top_p: float | Tensor) -> Tensor:
    """0 for all but the most likely tokens, up to and including the one at which their sum reaches `top_p`."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return probabilities.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), 0.0)


def compute_scores(
    logits: Tensor, sampling: Sampling, noise: Tensor | None, scalars: Scalars | Sampling | None = None
) -> Tensor:
    """Values [B, V] whose argmax is the token of gumbel-1, with `noise` [B, V], or of greedy decoding, without."""
    if sampling.temperature == 0:
        return logits
    assert noise is not None, "a draw at a temperature above 0 needs random numbers"
    numbers = scalars or sampling
    logits = filter_top_k(logits / numbers.temperature, sampling.top_k)
    if sampling.top_p < 1:
        logits = logits.masked_fill(filter_top_p(logits.softmax(-1), numbers.top_p) == 0, float("-inf"))
    return logits + noise


def draw_tokens(
    logits: Tensor, sampling: Sampling, random: Tensor | None, scalars: Scalars | Sampling | None = None
) -> Tensor:
    """Index [B] of the next token among logits [B, V].

    `random` is Gumbel noise [B, V] (gumbel-1) or a uniform number [B] in [0, 1) (inverse-1); greedy needs none.
    """
    if sampling.sampler == "gumbel-1" or sampling.temperature == 0:
        return compute_scores(logits, sampling, random, scalars).argmax(-1)
    assert random is not None, "a draw at a temperature above 0 needs random numbers"
    numbers = scalars or sampling
    probabilities = filter_top_k(logits / numbers.temperature, sampling.top_k).softmax(-1)
    if sampling.top_p < 1:
        probabilities = filter_top_p(probabilities, numbers.top_p)
    return _invert_cumulative(probabilities, random)


def _invert_cumulative(probabilities: Tensor, uniform: Tensor) -> Tensor:
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True skips tokens of probability 0, whose cumulative value equals that of the token before them.
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
