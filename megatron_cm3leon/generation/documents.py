"""Continuation of documents of texts and pictures: segment after segment, each by the grammar of its kind.

    text                    goes on, to <break> or </s>
    behind <break>          a text piece or an image code: what comes begins with it; or </s>
    picture                 exactly its codes, then <break> or </s>

Documents in the same place of this are decoded together. Each segment reads its document anew: a step of generation
costs as much as reading hundreds of tokens.
"""

from dataclasses import dataclass, field

import numpy as np

from megatron_cm3leon.generation import prompts
from megatron_cm3leon.generation.batch import decode_segments
from megatron_cm3leon.generation.grammar import Segment, choice_segment, opening_segment, picture_segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.types import MadePicture


@dataclass
class _Growing:
    """A document: its ids, what is to come, and the new parts."""

    ids: list[int]
    state: str
    """"text", "opening", "picture", "after picture" or "ended"."""
    parts: list = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    """Ids of the part that is being made."""


def complete_documents(
    generator, documents: list[list], retrieved: list, text: Sampling, image: Sampling, seed: int, segments: int,
    longest: int,
) -> list[list]:  # fmt: skip
    """See `Generator.complete`."""
    for name, sampling in (("text", text), ("image", image)):
        if sampling.contrasted:
            raise ValueError(
                f"guidance and contrast_k of {name} contrast a prompt with one without its condition, which a document "
                f"does not have; set guidance to 1 and contrast_k to 0."
            )
    if segments < 1:
        raise ValueError(f"segments ({segments}) must be at least 1.")
    growing = [_begin(generator, parts, docs) for parts, docs in zip(documents, retrieved, strict=True)]
    kinds = {"text": _write_text, "opening": _open, "picture": _draw_picture, "after picture": _leave_picture}
    while waiting := [one for one in growing if one.state != "ended"]:
        for state, go_on in kinds.items():
            group = [one for one in waiting if one.state == state]
            if group:
                sampling = image if state == "picture" else text
                go_on(generator, group, sampling, seed, longest)
        for one in waiting:
            if len(one.parts) >= segments:
                one.state = "ended"
    return [one.parts for one in growing]


def _begin(generator, parts: list, retrieved: list) -> _Growing:
    if isinstance(parts, str):
        raise ValueError(f"a document ({parts!r}) must be a list of texts and pictures, also where there is one only.")
    ids = prompts.begin_sample(retrieved, generator.vocabulary) + generator.encode_document(parts)
    generator.decoder.check_length(len(ids), 1)
    if not parts:
        return _Growing(ids, "opening")
    return _Growing(ids, "text" if isinstance(parts[-1], str) else "after picture")


def _room(generator, one: _Growing) -> int:
    """Tokens that can still be generated; the last one needs no position."""
    return generator.decoder.context - len(one.ids) + 1


def _decode(generator, group: list[_Growing], segment: Segment, sampling: Sampling, seed: int) -> np.ndarray:
    return decode_segments(generator.decoder, [one.ids for one in group], segment, sampling, [seed] * len(group))


def _write_text(generator, group: list[_Growing], sampling: Sampling, seed: int, longest: int) -> None:
    """Pieces up to <break> or </s>."""
    segment = generator.text_segment(longest, [one.ids for one in group], infill=False)
    for one, row in zip(group, _decode(generator, group, segment, sampling, seed), strict=True):
        pieces = generator.pieces(row)
        one.begun += pieces
        ending = int(row[row >= 0][-1])
        one.ids += [*pieces, ending]
        one.parts.append(generator.text.decode(one.begun))
        one.begun = []
        one.state = "opening" if ending == generator.vocabulary.break_id else "ended"


def _open(generator, group: list[_Growing], sampling: Sampling, seed: int, longest: int) -> None:
    """The first id of what comes; a picture only where it fits."""
    vocabulary = generator.vocabulary
    for pictures in (True, False):
        part = [one for one in group if (_room(generator, one) > vocabulary.image_tokens) == pictures]
        full = [one for one in part if _room(generator, one) < 2]
        for one in full:
            one.state = "ended"
        part = [one for one in part if one.state != "ended"]
        if not part:
            continue
        rows = _decode(generator, part, opening_segment(vocabulary, pictures), sampling, seed)
        for one, token in zip(part, rows[:, 0].tolist(), strict=True):
            one.ids.append(token)
            one.begun = [token]
            kind = "picture" if vocabulary.is_image(token) else "text"
            one.state = "ended" if token == vocabulary.eos else kind


def _draw_picture(generator, group: list[_Growing], sampling: Sampling, seed: int, longest: int) -> None:
    """The codes behind the first one."""
    vocabulary = generator.vocabulary
    length = vocabulary.image_tokens - 1
    rows = (
        _decode(generator, group, picture_segment(vocabulary, length), sampling, seed) if length else [()] * len(group)
    )
    codes = np.array([[*one.begun, *row] for one, row in zip(group, rows, strict=True)]) - vocabulary.image_start
    for one, row, own, picture in zip(group, rows, codes, generator.decode_pictures(codes), strict=True):
        one.ids += list(map(int, row))
        one.parts.append(MadePicture(None, seed, own, picture))
        one.begun, one.state = [], "after picture"


def _leave_picture(generator, group: list[_Growing], sampling: Sampling, seed: int, longest: int) -> None:
    """<break> or </s>."""
    vocabulary = generator.vocabulary
    for one in group:
        if _room(generator, one) < 1:
            one.state = "ended"
    group = [one for one in group if one.state != "ended"]
    if not group:
        return
    segment = choice_segment([vocabulary.eos, vocabulary.break_id])
    for one, token in zip(group, _decode(generator, group, segment, sampling, seed)[:, 0].tolist(), strict=True):
        one.ids.append(token)
        one.state = "opening" if token == vocabulary.break_id else "ended"
