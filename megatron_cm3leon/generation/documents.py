"""Continuation of documents of texts and images: segment after segment, each by the grammar of its kind.

    state          what is generated next                                      then
    text           text pieces to <break> or </s>                              opening, or ended
    opening        the first id after <break>: a text piece, an image code,
                   or </s>                                                     text, image, or ended
    image          the remaining codes                                         after image
    after image    <break> or </s>                                             opening, or ended

Documents in the same state are decoded together. Each segment reads its document from the beginning: one step of
generation costs as much as reading hundreds of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_cm3leon.generation import prompts
from megatron_cm3leon.generation.batch import decode_segments
from megatron_cm3leon.generation.codec import Codec
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import (
    Segment,
    choice_segment,
    image_segment,
    opening_segment,
    text_segment,
)
from megatron_cm3leon.generation.sampling import TEXT_SAMPLING, Sampling
from megatron_cm3leon.generation.types import GeneratedImage, ImageInput


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """How documents are continued."""

    text: Sampling = TEXT_SAMPLING
    """Of text pieces, and of the choice between a text, an image and the end."""
    image: Sampling = field(default_factory=lambda: Sampling(temperature=0.7))
    """Of image codes."""
    segments: int = 4
    """New texts and images per document, at most."""
    longest: int = 64
    """Text pieces of a new text, at most."""

    def __post_init__(self) -> None:
        for name, sampling in (("text", self.text), ("image", self.image)):
            if sampling.needs_unconditional:
                raise ValueError(
                    f"guidance ({sampling.guidance}) and contrast_k ({sampling.contrast_k}) of {name} contrast a "
                    f"prompt with one without its condition, which a document does not have; set guidance to 1 and "
                    f"contrast_k to 0."
                )
        if self.segments < 1:
            raise ValueError(f"segments ({self.segments}) must be at least 1.")


@dataclass
class _PartialDocument:
    """A document that is being continued: its ids, its state, and the new parts."""

    ids: list[int]
    state: str
    """"text", "opening", "image", "after image" or "ended"."""
    parts: list[str | GeneratedImage] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)
    """Ids of the part that is being generated."""


def complete_documents(
    decoder: Decoder,
    codec: Codec,
    documents: Sequence[Sequence[str | ImageInput]],
    retrieved: Sequence[Sequence],
    options: CompletionOptions,
) -> list[list[str | GeneratedImage]]:
    """New texts and images of each document; see `Generator.complete`."""
    completion = _Completion(decoder, codec, options)
    partial = [completion.begin(parts, docs) for parts, docs in zip(documents, retrieved, strict=True)]
    while unfinished := [one for one in partial if one.state != "ended"]:
        for state, continue_group in completion.transitions.items():
            group = [one for one in unfinished if one.state == state]
            if group:
                continue_group(group)
        for one in unfinished:
            if len(one.parts) >= options.segments:
                one.state = "ended"
    return [one.parts for one in partial]


class _Completion:
    """The transitions between the states of documents."""

    def __init__(self, decoder: Decoder, codec: Codec, options: CompletionOptions) -> None:
        self.decoder, self.codec, self.options = decoder, codec, options
        self.vocabulary = codec.vocabulary
        self.transitions: dict[str, Callable[[list[_PartialDocument]], None]] = {
            "text": self._continue_text,
            "opening": self._open_part,
            "image": self._finish_image,
            "after image": self._leave_image,
        }

    def begin(self, parts: Sequence[str | ImageInput], retrieved: Sequence) -> _PartialDocument:
        if isinstance(parts, str):
            raise ValueError(f"a document ({parts!r}) must be a list of texts and images, even of one.")
        ids = prompts.begin_sample(retrieved, self.vocabulary) + self.codec.encode_document(parts)
        self.decoder.check_length(len(ids), 1)
        if not parts:
            return _PartialDocument(ids, "opening")
        return _PartialDocument(ids, "text" if isinstance(parts[-1], str) else "after image")

    def _count_free(self, one: _PartialDocument) -> int:
        """Tokens that can still be generated; the last one needs no position."""
        return self.decoder.context - len(one.ids) + 1

    def _decode(self, group: list[_PartialDocument], segment: Segment, sampling: Sampling) -> np.ndarray:
        """Ids [documents, segment.length] that follow."""
        return decode_segments(
            self.decoder, [one.ids for one in group], segment, sampling, [sampling.seed] * len(group)
        )

    def _continue_text(self, group: list[_PartialDocument]) -> None:
        """Text pieces up to <break> or </s>."""
        length = self.decoder.fit_text(self.options.longest, [one.ids for one in group])
        rows = self._decode(group, text_segment(self.vocabulary, length), self.options.text)
        for one, row in zip(group, rows, strict=True):
            pieces, ending = self.codec.trim_text(row), int(row[row >= 0][-1])
            one.ids += [*pieces, ending]
            one.parts.append(self.codec.text.decode([*one.unfinished, *pieces]))
            one.unfinished = []
            one.state = "opening" if ending == self.vocabulary.break_id else "ended"

    def _open_part(self, group: list[_PartialDocument]) -> None:
        """The first id of the next part; an image only where all its codes fit."""
        for one in group:
            if self._count_free(one) < 2:
                one.state = "ended"
        for image_fits in (True, False):
            part = [
                one
                for one in group
                if one.state == "opening" and (self._count_free(one) > self.vocabulary.image_tokens) == image_fits
            ]
            if part:
                rows = self._decode(part, opening_segment(self.vocabulary, image_fits), self.options.text)
                for one, token in zip(part, rows[:, 0].tolist(), strict=True):
                    self._add_opening(one, token)

    def _add_opening(self, one: _PartialDocument, token: int) -> None:
        one.ids.append(token)
        one.unfinished = [token]
        if token == self.vocabulary.eos:
            one.state = "ended"
        else:
            one.state = "image" if self.vocabulary.is_image(token) else "text"

    def _finish_image(self, group: list[_PartialDocument]) -> None:
        """Generate the remaining image codes of each document in `group`, decode the images and append them."""
        length = self.vocabulary.image_tokens - 1
        rows = np.zeros((len(group), 0), np.int64)
        if length:
            rows = self._decode(group, image_segment(self.vocabulary, length), self.options.image)
        ids = np.array([[*one.unfinished, *row] for one, row in zip(group, rows, strict=True)])
        codes = ids - self.vocabulary.image_start
        images = self.codec.decode_images(codes)
        for one, row, image_codes, image in zip(group, rows, codes, images, strict=True):
            one.ids += list(map(int, row))
            one.parts.append(GeneratedImage(None, self.options.image.seed, image_codes, image))
            one.unfinished, one.state = [], "after image"

    def _leave_image(self, group: list[_PartialDocument]) -> None:
        """<break> or </s> after an image."""
        for one in group:
            if self._count_free(one) < 1:
                one.state = "ended"
        group = [one for one in group if one.state != "ended"]
        if not group:
            return
        segment = choice_segment([self.vocabulary.eos, self.vocabulary.break_id])
        rows = self._decode(group, segment, self.options.text)
        for one, token in zip(group, rows[:, 0].tolist(), strict=True):
            one.ids.append(token)
            one.state = "opening" if token == self.vocabulary.break_id else "ended"
