"""Grammar: which ids may come next, so that every output is well formed.

Generation is a run of one segment: a picture (exactly its number of image codes), a piece of a picture, or
text up to an ending token. The run's ids are the only vocabulary rows whose logits are computed: a text piece
inside a picture, an image code inside text, padding and reserved ids cannot be drawn at any temperature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cm3leon.tokenizers.vocab import Vocabulary


@dataclass(frozen=True)
class Segment:
    """What one run may hold."""

    allowed: Tensor
    """Vocabulary ids that may be drawn, ascending."""
    length: int
    """Tokens: exactly so many where nothing ends the run, else at most, the ending token included."""
    ends: tuple[int, ...] = ()
    """Ids that end the run."""


def picture_segment(vocabulary: Vocabulary, length: int | None = None) -> Segment:
    """A whole picture, or `length` codes of one."""
    allowed = torch.arange(vocabulary.image_start, vocabulary.image_end)
    return Segment(allowed, vocabulary.image_tokens if length is None else length)


def text_segment(vocabulary: Vocabulary, length: int, *, infill: bool = False) -> Segment:
    """At most `length` text pieces, then </s> or <break>, or <eoss> where a masked span is filled."""
    ends = (vocabulary.eoss,) if infill else (vocabulary.eos, vocabulary.break_id)
    pieces = torch.arange(vocabulary.text_size)
    return Segment(torch.cat([pieces, torch.tensor(ends)]), length + 1, ends)


def opening_segment(vocabulary: Vocabulary, pictures: bool = True) -> Segment:
    """One id behind <break>: a text piece or an image code (where `pictures`), or </s>."""
    end = vocabulary.image_end if pictures else vocabulary.text_size
    return choice_segment([*range(end), vocabulary.eos])


def choice_segment(ids: list[int]) -> Segment:
    """One of these ids."""
    return Segment(torch.tensor(sorted(ids)), 1)
