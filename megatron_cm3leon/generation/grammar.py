"""Grammar: which ids may come next, so that every output is well formed.

One decoding call generates one segment: an image (exactly its number of image codes), a part of an image, or text up
to an ending token. Logits are computed only for the ids of the segment: a text piece inside an image, an image code
inside text, padding and reserved ids cannot be drawn at any temperature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cm3leon.tokenizers.vocab import Vocabulary


@dataclass(frozen=True)
class Segment:
    """What one decoding call may generate."""

    allowed: Tensor
    """Vocabulary ids that may be drawn, ascending."""
    length: int
    """Tokens: this many without ending tokens, else at most this many, the ending token included."""
    ends: tuple[int, ...] = ()
    """Ids that end the segment."""


def image_segment(vocabulary: Vocabulary, length: int | None = None) -> Segment:
    """An image, or `length` codes of one."""
    allowed = torch.arange(vocabulary.image_start, vocabulary.image_end)
    return Segment(allowed, vocabulary.image_tokens if length is None else length)


def text_segment(vocabulary: Vocabulary, length: int, *, infill: bool = False) -> Segment:
    """At most `length` text pieces, then </s> or <break>; after the span of a mask (`infill`), <eoss>."""
    ends = (vocabulary.eoss,) if infill else (vocabulary.eos, vocabulary.break_id)
    pieces = torch.arange(vocabulary.text_size)
    return Segment(torch.cat([pieces, torch.tensor(ends)]), length + 1, ends)


def opening_segment(vocabulary: Vocabulary, images: bool = True) -> Segment:
    """The id after <break>: a text piece, an image code (if `images`), or </s>."""
    end = vocabulary.image_end if images else vocabulary.text_size
    return choice_segment([*range(end), vocabulary.eos])


def choice_segment(ids: list[int]) -> Segment:
    """One of these ids."""
    return Segment(torch.tensor(sorted(ids)), 1)
