"""One step of decoding for a batch: draw a token for each sequence from its hidden state, and append it.

    head logits -> guidance or CD-K -> temperature, top-k, top-p -> noise -> argmax -> given ids -> stored ids
    -> embedding -> layers, keys and values into the cache -> the next hidden state

All that changes between steps is in tensors on the device, the position and the sampling's numbers included: the host
only calls, so that the very same calls can be recorded once and replayed (step_graph.py). On a CPU they are just made.

B sequences, R rows (both streams of guidance: 2 B), V ids that may be drawn, L tokens that are kept, H hidden.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cm3leon.generation.cache import Cache
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.noise import build_source
from megatron_cm3leon.generation.sampling import Sampling, Scalars, contrast, draw, score


@dataclass(frozen=True)
class StepShape:
    """What shapes a step: steps of equal shape differ in the data of tensors alone."""

    sequences: int
    size: int
    """Positions of the cache."""
    length: int
    """Tokens that are kept for each sequence: the segment's, or more."""
    allowed: bytes
    """The vocabulary ids that may be drawn."""
    ends: tuple[int, ...]
    structure: tuple
    """See `Sampling.structure`."""
    forced: bool
    """Whether some ids are given."""
    margins: bool
    """Whether the differences of the two largest values of each draw are kept."""

    @classmethod
    def of(cls, segment: Segment, sampling: Sampling, *numbers: int, forced: bool, margins: bool) -> "StepShape":
        """`numbers` are sequences, size and length."""
        allowed = segment.allowed.numpy().tobytes()
        return cls(*numbers, allowed, segment.ends, sampling.structure, forced, margins)


class DecodingStep:
    """State of a batch on the device, and the calls of one step."""

    def __init__(
        self, decoder: Decoder, shape: StepShape, segment: Segment, sampling: Sampling, cache: Cache, fused=None
    ) -> None:
        """`fused` has kernels of its own for what the decoder does: `logits(hidden, head)`, and `advance(ids, cache)`,
        which reads the filled part of the cache and counts its lengths."""
        self.decoder, device = decoder, decoder.device
        self.shape, self.sampling, self.cache, self.fused = shape, sampling, cache, fused
        self.head, self.allowed = decoder.head(segment.allowed), segment.allowed.to(device)
        self.ends = torch.tensor(segment.ends, dtype=torch.long, device=device)
        count, kept = shape.sequences, (shape.sequences, shape.length)
        self.hidden = torch.zeros(len(cache.rows), decoder.shape.hidden, dtype=decoder.words.dtype, device=device)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)
        self.ids = torch.full(kept, -1, device=device)
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        self.forced = torch.full(kept, -1, device=device) if shape.forced else None
        self.margins = torch.zeros(kept, device=device) if shape.margins else None
        self.scalars, self.chance = Scalars(device), None
        if sampling.temperature > 0:
            self.chance = build_source(self.allowed, count, shape.length, sampling.sampler)

    def begin(
        self, given: list, without: list, room: int, sampling: Sampling, seeds: list[int], forced: np.ndarray | None
    ) -> None:
        """Read the prompts, then those of guidance's other stream, for `room` tokens each."""
        self.hidden.copy_(self.decoder.start(given + without, room, self.cache)[0])
        self.turn.zero_()
        self.ids.fill_(-1)
        self.done.zero_()
        self.scalars.copy(sampling)
        if forced is not None:
            self.forced[:, :room] = torch.from_numpy(forced)
        if self.chance is not None:
            self.chance.begin(seeds, given)

    def prepare(self, turn: int) -> None:
        """Called by the host before each step, in order."""
        if self.chance is not None:
            self.chance.prepare(turn)

    def draw(self) -> Tensor:
        """Ids [B] of the next tokens, stored at this turn."""
        logits = (self.fused or self.decoder).logits(self.hidden, self.head)
        if self.sampling.contrasted:
            logits = contrast(*logits.chunk(2), self.sampling, self.scalars)
        chance = None if self.chance is None else self.chance.at(self.turn)
        token = self.allowed[self._choose(logits, chance)]
        if self.forced is not None:
            forced = self.forced.index_select(1, self.turn)[:, 0]
            token = torch.where(forced >= 0, forced, token)
        kept = token
        if len(self.ends):
            kept = token.masked_fill(self.done, -1)
            self.done |= (token[:, None] == self.ends).any(1)
        self.ids.index_copy_(1, self.turn, kept[:, None])
        return token

    def _choose(self, logits: Tensor, chance: Tensor | None) -> Tensor:
        if self.margins is None:
            return draw(logits, self.sampling, chance, self.scalars)
        largest, indices = score(logits, self.sampling, chance, self.scalars).topk(min(2, len(self.allowed)))
        self.margins.index_copy_(1, self.turn, largest[:, :1] - largest[:, -1:])
        return indices[:, 0]

    def advance(self, width: int, masked: bool) -> None:
        """Draw tokens and append them; see `Decoder.advance`."""
        token = self.draw()
        ids = torch.cat([token, token]) if self.sampling.contrasted else token
        if self.fused is None:
            self.hidden.copy_(self.decoder.advance(ids, self.cache, width, masked))
        else:
            self.hidden.copy_(self.fused.advance(ids, self.cache))
        self.turn += 1
