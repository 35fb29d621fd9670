"""Layout of some blocks before masking: which documents and separators stand where; and writing the tokens.

A packing makes a Layout from lengths and draws alone, for many blocks at once. `write_layout` reads the documents
and puts them in place. Rows are the blocks asked for; a place is a token of a block, from 0.
"""

from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.stream.concat import Library
from megatron_cm3leon.data.stream.samples import shorten_document
from megatron_cm3leon.tokenizers.vocab import Vocabulary


@dataclass
class Layout:
    """Where everything stands in some blocks."""

    length: int
    """Tokens of a block."""
    numbers: np.ndarray
    """Numbers of the blocks, int64 [rows]."""
    epochs: np.ndarray
    """Epoch of the first sample of each block, int64 [rows]."""
    filled: np.ndarray
    """Tokens of each block's source, int64 [rows]; the rest is <pad>."""
    query_starts: np.ndarray
    """First token of the query document (packing=query), else 0; int64 [rows]."""
    trimmed: np.ndarray
    """Tokens that the block cannot hold whatever masking does, int64 [rows]."""
    rows: np.ndarray
    """Block of each document, int64 [documents], not falling."""
    documents: np.ndarray
    """Number in the library, int64 [documents]."""
    image_first: np.ndarray
    """Whether the picture of a pair comes first, bool [documents]."""
    retrieved: np.ndarray
    """Whether it is a retrieved document, bool [documents]."""
    places: np.ndarray
    """Where its first token stands; negative where its head is in an earlier block or cut; int64 [documents]."""
    lengths: np.ndarray
    """Its tokens; fewer than the library's where its text is shortened; int64 [documents]."""
    eos: np.ndarray
    """Where </s> stands, as row * length + place; int64."""
    breaks: np.ndarray
    """Where <break> stands behind a retrieved document, as row * length + place; int64."""

    def of_row(self, row: int) -> slice:
        """The documents of one block."""
        return slice(*np.searchsorted(self.rows, [row, row + 1]).tolist())


def write_layout(layout: Layout, library: Library, out: np.ndarray) -> None:
    """Write the tokens of a layout into `out` [rows, length], of the library's dtype, which comes filled with <pad>."""
    vocabulary = library.vocabulary
    flat_out = out.reshape(-1)
    if len(layout.documents):
        ids, which = _read(layout, library)
        starts, stops, sources, breaks = _pieces(layout, ids, which, vocabulary)
        for start, stop, source in zip(starts.tolist(), stops.tolist(), sources.tolist(), strict=True):
            flat_out[start:stop] = ids[source : source + stop - start]
        flat_out[breaks] = vocabulary.break_id
    flat_out[layout.breaks] = vocabulary.break_id
    flat_out[layout.eos] = vocabulary.eos


def _read(layout: Layout, library: Library) -> tuple[np.ndarray, np.ndarray]:
    """All documents one behind the other, and which of them each of the layout's is.

    Those planned shorter than they are lose text. One that goes on in the next block is read once.
    """
    documents, lengths = layout.documents, layout.lengths
    first = np.ones(len(documents), bool)
    first[1:] = (documents[1:] != documents[:-1]) | (lengths[1:] != lengths[:-1])
    numbers, planned = documents[first], lengths[first]
    ids, lengths = library.read_many(numbers), library.lengths[numbers]
    short = np.flatnonzero(planned < lengths)
    if len(short):
        parts = np.split(ids, np.cumsum(lengths, dtype=np.int64)[:-1])
        for place in short.tolist():
            parts[place] = shorten_document(parts[place], int(planned[place]), library.vocabulary)
        ids = np.concatenate(parts)
    return ids, np.cumsum(first) - 1


def _pieces(layout: Layout, ids: np.ndarray, which: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, ...]:
    """What to copy, as starts and stops in the blocks (row * length + place) and starts in `ids`, the documents.

    A pair that is turned round is two pieces; the last array says where its <break> stands then.
    """
    lengths, places = layout.lengths, layout.places
    sizes = np.empty(which[-1] + 1, np.int64)
    sizes[which] = lengths
    ends = np.cumsum(sizes)
    firsts = ends - sizes
    breaks = np.flatnonzero(ids == vocabulary.break_id)
    owners = np.searchsorted(firsts, breaks, "right") - 1
    middle = firsts.copy()
    middle[owners] = breaks  # of a document with one <break>: where it is
    image_before = (middle > firsts) & vocabulary.is_image(ids[firsts])
    image_behind = (middle < ends - 1) & vocabulary.is_image(ids[ends - 1])
    pair = (np.bincount(owners, minlength=len(sizes)) == 1) & (image_before != image_behind)
    turned = pair[which] & (image_before[which] != layout.image_first)
    straight, turned = np.flatnonzero(~turned), np.flatnonzero(turned)
    firsts, middle, ends = firsts[which], middle[which], ends[which]
    before, behind = middle[turned] - firsts[turned], ends[turned] - middle[turned] - 1

    bases = layout.rows * layout.length
    sources = np.concatenate([firsts[straight], middle[turned] + 1, firsts[turned]])
    counts = np.concatenate([lengths[straight], behind, before])
    targets = np.concatenate([places[straight], places[turned], places[turned] + behind + 1])
    owners = np.concatenate([straight, turned, turned])
    base, room = bases[owners], layout.filled[layout.rows[owners]]
    heads = np.maximum(-targets, 0)
    starts, stops = targets + heads, np.minimum(targets + counts, room)
    inside = np.flatnonzero(stops > starts)
    new_breaks = places[turned] + behind
    visible = (new_breaks >= 0) & (new_breaks < layout.filled[layout.rows[turned]])
    return (
        (base + starts)[inside],
        (base + stops)[inside],
        (sources + heads)[inside],
        (bases[turned] + new_breaks)[visible],
    )
