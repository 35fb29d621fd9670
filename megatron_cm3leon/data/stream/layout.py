"""Layout of sequences before masking: positions of documents and separators; and writing the tokens.

A packing computes a Layout from lengths and random draws alone, for many sequences at once. `write_layout` reads the
documents and copies their tokens to these positions. Rows are the requested sequences; positions in a sequence count
from 0.
"""

from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.stream.concat import ConcatCorpus
from megatron_cm3leon.data.stream.samples import order_modalities, shorten_document
from megatron_cm3leon.data.stream.targets import PRETRAINING, build_form
from megatron_cm3leon.tokenizers.vocab import Vocabulary


@dataclass
class Layout:
    """Positions of documents and separators in some sequences."""

    length: int
    """Tokens of a sequence."""
    numbers: np.ndarray
    """Numbers of the sequences, int64 [rows]."""
    epochs: np.ndarray
    """Epoch of the first sample of each sequence, int64 [rows]."""
    filled: np.ndarray
    """Tokens of each sequence before masking, int64 [rows]; the rest is <pad>."""
    query_starts: np.ndarray
    """First token of the query document (packing=query), else 0; int64 [rows]."""
    trimmed: np.ndarray
    """Tokens that the packing cuts, whatever masking does, int64 [rows]."""
    rows: np.ndarray
    """Row of each document, int64 [documents], in ascending order."""
    documents: np.ndarray
    """Number in the ConcatCorpus, int64 [documents]."""
    image_first: np.ndarray
    """Whether the image of a pair comes first, bool [documents]."""
    retrieved: np.ndarray
    """Whether it is a retrieved document, bool [documents]."""
    forms: np.ndarray
    """Its form (targets.py), int8 [documents]; a document in the form MASKED includes a </s>."""
    shortened: np.ndarray
    """Whether it has fewer tokens than its form, bool [documents]."""
    starts: np.ndarray
    """Position of its first token; negative if its head is cut or in an earlier sequence; int64 [documents]."""
    lengths: np.ndarray
    """Its tokens, int64 [documents]."""
    eos: np.ndarray
    """Positions of </s> outside of documents, as row * length + position; int64."""
    breaks: np.ndarray
    """Positions of the <break> after each retrieved document, as row * length + position; int64."""

    def of_row(self, row: int) -> slice:
        """The documents of one row."""
        return slice(*np.searchsorted(self.rows, [row, row + 1]).tolist())


def write_layout(layout: Layout, corpus: ConcatCorpus, out: np.ndarray, out_targets: np.ndarray | None = None) -> None:
    """Write the tokens of a layout into `out` [rows, length], of the corpus's dtype and filled with <pad>.

    `out_targets`, bool [rows, length] and filled with False, is set for the tokens of targets of query documents.
    """
    vocabulary = corpus.vocabulary
    flat_out = out.reshape(-1)
    if len(layout.documents):
        ids, which, marks = _read(layout, corpus)
        starts, stops, sources, breaks = _pieces(layout, ids, which, vocabulary)
        for start, stop, source in zip(starts.tolist(), stops.tolist(), sources.tolist(), strict=True):
            flat_out[start:stop] = ids[source : source + stop - start]
        if out_targets is not None and marks is not None:
            flat_targets = out_targets.reshape(-1)
            for start, stop, source in zip(starts.tolist(), stops.tolist(), sources.tolist(), strict=True):
                flat_targets[start:stop] = marks[source : source + stop - start]
        flat_out[breaks] = vocabulary.break_id
    flat_out[layout.breaks] = vocabulary.break_id
    flat_out[layout.eos] = vocabulary.eos


def _read(layout: Layout, corpus: ConcatCorpus) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The ids of all documents in their forms, concatenated, and the index of each of the layout's documents in them.

    The last array says which ids are targets of a query document; None without instruction documents. Documents
    planned shorter than they are lose text. A document that continues in the next sequence is read once.
    """
    documents, planned, forms = layout.documents, layout.lengths, layout.forms
    first = np.ones(len(documents), bool)
    first[1:] = (documents[1:] != documents[:-1]) | (planned[1:] != planned[:-1]) | (forms[1:] != forms[:-1])
    first[1:] |= layout.retrieved[1:] != layout.retrieved[:-1]
    numbers, planned, forms = documents[first], planned[first], forms[first]
    ids, lengths = corpus.read_many(numbers), corpus.lengths[numbers]
    short, instructions = np.flatnonzero((planned < lengths) & (forms == PRETRAINING)), np.flatnonzero(forms)
    marks = None
    if len(short) or len(instructions):
        parts = np.split(ids, np.cumsum(lengths, dtype=np.int64)[:-1])
        for index in short.tolist():
            parts[index] = shorten_document(parts[index], int(planned[index]), corpus.vocabulary)
        if len(instructions):
            is_target = [np.zeros(length, bool) for length in planned.tolist()]
            context = layout.retrieved[first]
            for index, targets in zip(instructions.tolist(), corpus.targets(numbers[instructions]), strict=True):
                parts[index], found = build_form(
                    parts[index], targets, int(forms[index]), int(planned[index]), corpus.vocabulary
                )
                is_target[index] = found & ~context[index]
            marks = np.concatenate(is_target)
        ids = np.concatenate(parts)
    return ids, np.cumsum(first) - 1, marks


def read_document(corpus: ConcatCorpus, number: int, image_first: bool, form: int) -> np.ndarray:
    """The ids of one complete document, as `write_layout` writes them."""
    ids = corpus.read(number)
    if form == PRETRAINING:
        return np.concatenate(order_modalities(ids, image_first, corpus.vocabulary))
    [targets] = corpus.targets(np.array([number]))
    return build_form(ids, targets, form, 2 * len(ids) + 4 * len(targets), corpus.vocabulary)[0]


def _pieces(layout: Layout, ids: np.ndarray, which: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, ...]:
    """Pieces to copy: starts and stops in the output (row * length + position), and starts in `ids`.

    A pair whose modalities are swapped is two pieces; the last array holds the new positions of its <break>. A document
    with targets keeps its order.
    """
    lengths, first_tokens = layout.lengths, layout.starts
    sizes = np.empty(which[-1] + 1, np.int64)
    sizes[which] = lengths
    ends = np.cumsum(sizes)
    firsts = ends - sizes
    breaks = np.flatnonzero(ids == vocabulary.break_id)
    owners = np.searchsorted(firsts, breaks, "right") - 1
    middle = firsts.copy()
    middle[owners] = breaks  # position of the <break>, for a document with one
    image_before = (middle > firsts) & vocabulary.is_image(ids[firsts])
    image_after = (middle < ends - 1) & vocabulary.is_image(ids[ends - 1])
    pair = (np.bincount(owners, minlength=len(sizes)) == 1) & (image_before != image_after)
    is_swapped = pair[which] & (image_before[which] != layout.image_first) & (layout.forms == PRETRAINING)
    kept, swapped = np.flatnonzero(~is_swapped), np.flatnonzero(is_swapped)
    firsts, middle, ends = firsts[which], middle[which], ends[which]
    before, after = middle[swapped] - firsts[swapped], ends[swapped] - middle[swapped] - 1

    bases = layout.rows * layout.length
    sources = np.concatenate([firsts[kept], middle[swapped] + 1, firsts[swapped]])
    counts = np.concatenate([lengths[kept], after, before])
    targets = np.concatenate([first_tokens[kept], first_tokens[swapped], first_tokens[swapped] + after + 1])
    owners = np.concatenate([kept, swapped, swapped])
    base, room = bases[owners], layout.filled[layout.rows[owners]]
    heads = np.maximum(-targets, 0)
    starts, stops = targets + heads, np.minimum(targets + counts, room)
    inside = np.flatnonzero(stops > starts)
    new_breaks = first_tokens[swapped] + after
    visible = (new_breaks >= 0) & (new_breaks < layout.filled[layout.rows[swapped]])
    return (
        (base + starts)[inside],
        (base + stops)[inside],
        (sources + heads)[inside],
        (bases[swapped] + new_breaks)[visible],
    )
