"""CM3 masking: spans of a sequence move to its end, each after its sentinel (CM3Leon section 2.2).

Input:  a source, up to `length` tokens of samples, and the loss weight of each token.
Output: `length` tokens: the source with every chosen span replaced by <sentinel:i>, then for each span
        <sentinel:i> span <eoss>, then <pad>. Sentinels are numbered from left to right.

The rules are those of the released training code (2023): the number of spans is Poisson(mean), clamped
to [0, max_spans]; one span is two sorted uniforms; for n > 1, n * n candidates are drawn and up to n
disjoint ones kept; a span that crosses a delimiter is clipped to the segment with the largest overlap. Here the
delimiters are <break> and </s>: a moved span never holds the end of a sample.

Two options are not the paper's: a complete segment moves (rotation), or a part of one segment does (infilling): a span
of a text, in which short ones are the most frequent, or the tokens from the first to the last one of a box of an image,
which are what the prompts of infilling hide.

A span adds three tokens. If the sequence has no room for them, the source is cut *before* spans are drawn, so no
sentinel is lost: the tail is cut under packing=stream, the head (after the leading </s>) under packing=query.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_cm3leon.config.schema import CM3Config
from megatron_cm3leon.data.stream.order import derive_key, draw_uniform, poisson_table
from megatron_cm3leon.tokenizers.vocab import Vocabulary

TOKENS_PER_SPAN = 3
"""A moved span adds its sentinel twice and <eoss>."""
INFILL_DRAWS = 5
"""Random numbers of a part: its segment; height, width, and the room above and on the left of it."""


@dataclass(frozen=True)
class MaskDraws:
    """Random draws for some sequences, made before their tokens are known."""

    spans: np.ndarray
    """Spans to move, int64 [sequences]; fewer are moved if not enough candidates are disjoint."""
    rotated: np.ndarray
    """Whether a whole segment moves instead, bool [sequences]."""
    infilled: np.ndarray
    """Whether a part of one segment moves instead, bool [sequences]."""
    without_documents: np.ndarray
    """Whether the retrieved documents are dropped, bool [sequences]."""
    uniforms: list[list[float]]
    """Numbers in [0, 1) for each sequence: pairs for candidate spans; one that chooses the segment of rotation; or
    INFILL_DRAWS, which choose the segment and the part of infilling."""


class SpanSampler:
    """Draws how a sequence is masked, as a function of (seed, sequence number)."""

    def __init__(self, config: CM3Config, seed: int, max_spans: int) -> None:
        self.config = config
        self.max_spans = max(0, min(config.max_spans, max_spans))
        self.table = poisson_table(config.mean_spans)
        self.sequence_key = derive_key(seed, "cm3 block")
        self.span_key = derive_key(seed, "cm3 span")

    def draw(self, numbers: np.ndarray) -> MaskDraws:
        """Draws for sequences `numbers`, int64 [sequences]."""
        config = self.config
        masked, kind, count, dropped = draw_uniform(self.sequence_key, numbers[:, None], np.arange(4)).T
        segment_moves = (masked < config.probability) & (self.max_spans > 0)
        rotated = segment_moves & (kind < config.rotation_probability)
        infilled = segment_moves & ~rotated & (kind < config.rotation_probability + config.infill_probability)
        spans = np.maximum(np.searchsorted(self.table, count, "right"), config.min_spans)
        spans = np.minimum(spans, self.max_spans)
        spans = np.where(rotated | infilled, 1, np.where(masked < config.probability, spans, 0))
        needed = np.where(spans > 1, 2 * spans * spans, 2 * spans)
        needed[rotated], needed[infilled] = 1, INFILL_DRAWS
        ends = np.cumsum(needed)
        counters = np.arange(ends[-1]) - np.repeat(ends - needed, needed)
        uniforms = draw_uniform(self.span_key, np.repeat(numbers, needed), counters).tolist()
        pairs = zip((ends - needed).tolist(), ends.tolist(), strict=True)
        without_documents = (spans > 0) & (dropped < config.drop_documents_probability)
        return MaskDraws(spans, rotated, infilled, without_documents, [uniforms[start:end] for start, end in pairs])


def choose_spans(length: int, delimiters: list[int], count: int, uniforms: list[float]) -> list[tuple[int, int]]:
    """Up to `count` disjoint spans (start, end) of a source of `length` tokens, left to right.

    `uniforms` holds two numbers per candidate. No span holds token 0 or a delimiter, and none is empty.
    """
    kept: list[tuple[int, int]] = []
    for first, second in zip(uniforms[::2], uniforms[1::2], strict=True):
        start, end = 1 + int(min(first, second) * length), 1 + int(max(first, second) * length)
        index = bisect_left(kept, (start, end))
        free = (index == 0 or kept[index - 1][1] <= start) and (index == len(kept) or end <= kept[index][0])
        if start < end and free:
            insort(kept, (start, end))
            if len(kept) == count:
                break
    clipped = (_clip_to_segment(start, min(end, length), length, delimiters) for start, end in kept)
    return [(start, end) for start, end in clipped if start < end]


def _clip_to_segment(start: int, end: int, length: int, delimiters: list[int]) -> tuple[int, int]:
    """The part of a span in the segment that holds most of it; the first one of equal parts."""
    first, last = bisect_left(delimiters, start), bisect_left(delimiters, end)
    if first == last:
        return start, end
    edges = [-1, *delimiters, length]
    parts = [(max(start, edges[segment] + 1), min(end, edges[segment + 1])) for segment in range(first, last + 1)]
    return max(parts, key=lambda part: part[1] - part[0])


def choose_segment(delimiters: list[int], start: int, uniform: float) -> list[tuple[int, int]]:
    """One complete segment between two delimiters that begins at `start` or later; [] if there is none."""
    segments = [(left + 1, right) for left, right in pairwise(delimiters) if left + 1 >= start and right > left + 1]
    return [segments[int(uniform * len(segments))]] if segments else []


def choose_part(
    tokens: np.ndarray, segments: list[tuple[int, int]], uniforms: list[float], vocabulary: Vocabulary
) -> list[tuple[int, int]]:
    """The span that infilling hides in the only one of `segments`; [] if there is none.

    In a complete image it reaches from the first to the last code of a box, whose height and width are uniform; in any
    other segment of n tokens its length is n u^2, rounded up, with u uniform in [0, 1).
    """
    height, width, down, across = uniforms
    for start, end in segments:
        if end - start == vocabulary.image_tokens and vocabulary.is_image(tokens[start:end]).all():
            rows, columns = vocabulary.image_height, vocabulary.image_width
            height, width = 1 + int(height * rows), 1 + int(width * columns)
            first = int(down * (rows - height + 1)) * columns + int(across * (columns - width + 1))
            return [(start + first, start + first + (height - 1) * columns + width)]
        length = 1 + int(height**2 * (end - start))
        first = start + int(down * (end - start - length + 1))
        return [(first, first + length)]
    return []


def find_delimiters(tokens: np.ndarray, vocabulary: Vocabulary, moved: bool = False) -> list[int]:
    """Positions of <break> and </s>; with `moved` also of sentinels and <eoss>, which instruction documents hold."""
    found = (tokens == vocabulary.break_id) | (tokens == vocabulary.eos)
    if moved:
        found |= vocabulary.is_sentinel(tokens) | (tokens == vocabulary.eoss)
    return found.nonzero()[0].tolist()


def apply_spans(
    tokens: np.ndarray, values: np.ndarray | None, spans: list[tuple[int, int]], vocabulary: Vocabulary,
    out_tokens: np.ndarray, out_values: np.ndarray | None, first_sentinel: int = 0,
) -> int:  # fmt: skip
    """Write the masked source into `out_tokens` and `out_values`; returns the number of tokens written.

    `values` [..., tokens], if given, move with their tokens. A sentinel gets the value of the first token of its span,
    <eoss> that of the last. Either both of `values` and `out_values` are given or none. `first_sentinel`: number of the
    first span's sentinel.
    """
    position = done = 0
    pieces, marks = [], []  # (start, end, target) of copied tokens; (target, token, position of the value it gets)
    sentinel = vocabulary.sentinel(first_sentinel)
    for index, (start, end) in enumerate(spans):
        pieces.append((done, start, position))
        position += start - done
        marks.append((position, sentinel + index, start))
        position, done = position + 1, end
    pieces.append((done, len(tokens), position))
    position += len(tokens) - done
    for index, (start, end) in enumerate(spans):
        marks.append((position, sentinel + index, start))
        pieces.append((start, end, position + 1))
        position += 1 + end - start
        marks.append((position, vocabulary.eoss, end - 1))
        position += 1
    for start, end, target in pieces:
        out_tokens[target : target + end - start] = tokens[start:end]
    for target, token, _ in marks:
        out_tokens[target] = token
    if values is not None and out_values is not None:
        for start, end, target in pieces:
            out_values[..., target : target + end - start] = values[..., start:end]
        for target, _, origin in marks:
            out_values[..., target] = values[..., origin]
    return position


def cut_source(values: np.ndarray, room: int, cut: str) -> np.ndarray:
    """At most `room` tokens (the last axis): the tail is cut, or (cut="head") the tokens after token 0."""
    length = values.shape[-1]
    if length <= room:
        return values
    if cut == "tail":
        return values[..., :room]
    kept = values[..., length - room :].copy()
    kept[..., 0] = values[..., 0]
    return kept


def mask_sequence(
    tokens: np.ndarray, values: np.ndarray | None, query_start: int, wanted: int, rotated: bool, infilled: bool,
    uniforms: list[float], vocabulary: Vocabulary, cut: str, out_tokens: np.ndarray, out_values: np.ndarray | None,
    first_sentinel: int = 0,
) -> tuple[int, int]:  # fmt: skip
    """Mask one source into a sequence; returns the number of tokens cut from the source, and of tokens written.

    `values` [..., tokens], such as loss weights, move with their tokens. `out_tokens` [length] is passed filled with
    <pad>, `out_values` [..., length] with the values of <pad>. `query_start`: under `cut="head"`, position of the
    query document, among whose segments rotation and infilling choose: moving the last one trains the image given its
    caption, moving the first one the caption given its image (or the reverse, depending on the order of the pair).
    Under `cut="tail"` any complete segment of the sequence may move.

    `first_sentinel`: sentinels that the source already holds, in instruction documents. Spans hold none of them, and
    none lies in a target that was moved before.
    """
    length = len(out_tokens)
    source = cut_source(tokens, length - TOKENS_PER_SPAN * wanted, cut)
    shift = len(tokens) - len(source) if cut == "head" else 0
    spans = []
    if wanted:
        delimiters = find_delimiters(source, vocabulary, first_sentinel > 0)
        if rotated:
            spans = choose_segment(delimiters, query_start - shift, uniforms[0])
        elif infilled:
            segments = choose_segment(delimiters, query_start - shift, uniforms[0])
            spans = choose_part(source, segments, uniforms[1:], vocabulary)
        else:
            spans = choose_spans(len(source), delimiters, wanted, uniforms)
        if first_sentinel:
            spans = [span for span in spans if not _is_moved(source, span[1], delimiters, vocabulary)]
    kept = cut_source(tokens, length - TOKENS_PER_SPAN * len(spans), cut)  # spans that were not found free their room
    if shift and len(kept) > len(source):
        spans = [(start + len(kept) - len(source), end + len(kept) - len(source)) for start, end in spans]
    kept_values = None if values is None else cut_source(values, len(kept), cut)
    filled = apply_spans(kept, kept_values, spans, vocabulary, out_tokens, out_values, first_sentinel)
    return len(tokens) - len(kept), filled


def _is_moved(tokens: np.ndarray, end: int, delimiters: list[int], vocabulary: Vocabulary) -> bool:
    """Whether the token before `end` belongs to a moved target: the next delimiter is <eoss>."""
    following = bisect_left(delimiters, end)
    return following < len(delimiters) and int(tokens[delimiters[following]]) == vocabulary.eoss
