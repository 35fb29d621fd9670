"""One step of decoding for a batch: draw a token for each sequence from its hidden state, and append it.

    head logits -> guidance or CD-K -> temperature, top-k, top-p -> noise -> argmax -> forced ids -> stored ids
    -> embedding -> layers, keys and values into the cache -> the next hidden state

All state that changes between steps is in tensors on the device, including the position and the sampling's numbers, so
that the operations of a step can be recorded once and replayed (step_graph.py). On a CPU they are just executed.

B sequences, R rows (both streams of guidance: 2 B), V ids that may be drawn, L tokens that are kept, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_cm3leon.generation.cache import Cache
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.noise import build_source
from megatron_cm3leon.generation.sampling import Sampling, Scalars, combine_streams, compute_scores, draw_tokens

if TYPE_CHECKING:
    from megatron_cm3leon.generation.fused_step import FusedStep


@dataclass(frozen=True)
class BatchPrompts:
    """The prompts of a call, or of a batch: one row per sequence."""

    conditional: Sequence[list[int]]
    unconditional: Sequence[list[int]]
    """Prompts of the second stream; empty without guidance and CD-K."""
    seeds: Sequence[int]
    forced: np.ndarray | None = None
    """[rows, segment.length]: ids that replace drawn ones where they are not -1."""
    margins: np.ndarray | None = None
    """fp32 [rows, segment.length], filled by decoding: see near_ties.py."""

    @property
    def streams(self) -> list[list[int]]:
        """The prompts of both streams, one stream after the other."""
        return [*self.conditional, *self.unconditional]

    def part(self, rows: slice) -> "BatchPrompts":
        """Some rows; `margins` are a view."""
        forced, margins = (None if one is None else one[rows] for one in (self.forced, self.margins))
        return BatchPrompts(self.conditional[rows], self.unconditional[rows], self.seeds[rows], forced, margins)

    def pad(self, rows: int) -> "BatchPrompts":
        """The last row repeated up to `rows`, without margins."""
        numbers = [min(row, len(self.conditional) - 1) for row in range(rows)]
        return BatchPrompts(
            [self.conditional[number] for number in numbers],
            [self.unconditional[number] for number in numbers] if self.unconditional else [],
            [self.seeds[number] for number in numbers],
            None if self.forced is None else self.forced[numbers],
        )


@dataclass(frozen=True)
class StepShape:
    """What decides the operations of a step: steps of equal shape differ only in the data of their tensors."""

    sequences: int
    size: int
    """Positions of the cache."""
    length: int
    """Tokens that are stored for each sequence: the segment's length, or more."""
    allowed: bytes
    """The vocabulary ids that may be drawn."""
    ends: tuple[int, ...]
    structure: tuple
    """See `Sampling.structure`."""
    forced: bool
    """Whether some ids are forced."""
    margins: bool
    """Whether the difference between the two largest values of each draw is stored."""

    @classmethod
    def of(
        cls,
        segment: Segment,
        sampling: Sampling,
        *,
        sequences: int,
        size: int,
        length: int,
        forced: bool = False,
        margins: bool = False,
    ) -> "StepShape":
        """The shape of a step for a segment and a sampling."""
        allowed = segment.allowed.numpy().tobytes()
        return cls(sequences, size, length, allowed, segment.ends, sampling.structure, forced, margins)


class DecodingStep:
    """State of a batch on the device, and the operations of one step."""

    def __init__(
        self,
        decoder: Decoder,
        shape: StepShape,
        segment: Segment,
        sampling: Sampling,
        cache: Cache,
        fused: "FusedStep | None" = None,
    ) -> None:
        """`fused` replaces the decoder's `logits` and `advance` by fused kernels."""
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
        self.scalars = Scalars(device)
        self.random = None
        if sampling.temperature > 0:
            self.random = build_source(self.allowed, count, shape.length, sampling.sampler)

    def begin(self, prompts: BatchPrompts, room: int, sampling: Sampling) -> None:
        """Compute the prompts of both streams, for `room` tokens each."""
        self.hidden.copy_(self.decoder.start(prompts.streams, room, self.cache)[0])
        self.turn.zero_()
        self.ids.fill_(-1)
        self.done.zero_()
        self.scalars.load(sampling)
        if self.forced is not None and prompts.forced is not None:
            self.forced[:, :room] = torch.from_numpy(prompts.forced)
        if self.random is not None:
            self.random.begin(prompts.seeds, prompts.conditional)

    def prepare(self, turn: int) -> None:
        """Called by the host before each step, in order."""
        if self.random is not None:
            self.random.prepare(turn)

    def has_ended(self) -> bool:
        """Whether all sequences have their ending token; waits for the device."""
        return bool(self.shape.ends) and bool(self.done.all())

    def read_margins(self, rows: int, length: int) -> np.ndarray:
        """The stored margins of the first rows, [rows, length]."""
        assert self.margins is not None, "the step was built without margins"
        return self.margins[:rows, :length].cpu().numpy()

    def draw(self) -> Tensor:
        """Draw the ids [B] of the next tokens and store them."""
        logits = (self.fused or self.decoder).logits(self.hidden, self.head)
        if self.sampling.needs_unconditional:
            conditional, unconditional = logits.chunk(2)
            logits = combine_streams(conditional, unconditional, self.sampling, self.scalars)
        random = None if self.random is None else self.random.at(self.turn)
        token = self.allowed[self._choose(logits, random)]
        if self.forced is not None:
            forced = self.forced.index_select(1, self.turn)[:, 0]
            token = torch.where(forced >= 0, forced, token)
        kept = token
        if len(self.ends):
            kept = token.masked_fill(self.done, -1)
            self.done |= (token[:, None] == self.ends).any(1)
        self.ids.index_copy_(1, self.turn, kept[:, None])
        return token

    def _choose(self, logits: Tensor, random: Tensor | None) -> Tensor:
        if self.margins is None:
            return draw_tokens(logits, self.sampling, random, self.scalars)
        scores = compute_scores(logits, self.sampling, random, self.scalars)
        largest, indices = scores.topk(min(2, len(self.allowed)))
        self.margins.index_copy_(1, self.turn, largest[:, :1] - largest[:, -1:])
        return indices[:, 0]

    def advance(self, width: int, masked: bool) -> None:
        """Draw the next tokens and append them; see `Decoder.advance`."""
        token = self.draw()
        ids = torch.cat([token, token]) if self.sampling.needs_unconditional else token
        if self.fused is None:
            self.hidden.copy_(self.decoder.advance(ids, self.cache, width, masked))
        else:
            self.hidden.copy_(self.fused.advance(ids, self.cache))
        self.turn += 1
