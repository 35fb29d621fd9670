"""Packing report: what blocks of a stream hold, and what the packing leaves empty or cuts."""

from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.stream.stream import Stream

_BLOCKS_AT_ONCE = 256


@dataclass
class Waste:
    """Sums over some blocks of a stream."""

    blocks: int = 0
    places: int = 0
    """Places of all blocks."""
    padding: int = 0
    """Places that hold <pad>."""
    trimmed: int = 0
    """Tokens cut by the packing or pushed out by masking."""
    spans: int = 0
    """Moved spans."""
    queries: int = 0
    """Query documents, or parts of one, in these blocks."""
    whole: int = 0
    """Query documents that stand whole in one block, before masking."""
    retrieved: int = 0
    """Retrieved documents, or parts of one."""


def measure_waste(stream: Stream, start: int, count: int) -> Waste:
    """Count what blocks start..start+count-1 hold."""
    waste, vocabulary = Waste(), stream.vocabulary
    for first in range(start, start + count, _BLOCKS_AT_ONCE):
        plan = stream.plan(np.arange(first, min(first + _BLOCKS_AT_ONCE, start + count)))
        blocks, layout = stream.fill(plan), plan.layout
        waste.blocks += len(layout.numbers)
        waste.places += blocks.tokens.size
        waste.padding += int((blocks.tokens == vocabulary.pad).sum())
        waste.trimmed += int(blocks.trimmed.sum())
        waste.spans += int((blocks.tokens == vocabulary.eoss).sum())
        inside = (layout.places >= 0) & (layout.places + layout.lengths <= layout.filled[layout.rows])
        whole = inside & (layout.lengths == stream.library.lengths[layout.documents]) & ~layout.retrieved
        waste.queries += int((~layout.retrieved).sum())
        waste.whole += int(whole.sum())
        waste.retrieved += int(layout.retrieved.sum())
    return waste


def describe_waste(stream: Stream, start: int, count: int) -> str:
    """The report as text."""
    waste = measure_waste(stream, start, count)
    lines = [
        f"blocks {start}..{start + count - 1} under packing={stream.config.data.packing}, {stream.length} places each",
        f"  padding   {waste.padding} places, {waste.padding / waste.places:.2%}",
        f"  trimmed   {waste.trimmed} tokens, {waste.trimmed / waste.places:.2%} of the places",
        f"  spans     {waste.spans} moved, {waste.spans / waste.blocks:.2f} a block",
        f"  queries   {waste.whole} whole of {waste.queries} that have tokens in these blocks",
        f"  retrieved {waste.retrieved}, {waste.retrieved / max(1, waste.queries):.2f} a query",
        f"  arithmetic of whole samples: {_arithmetic(stream)}",
    ]
    return "\n".join(lines)


def _arithmetic(stream: Stream) -> str:
    """What whole samples of equal length would pad, whatever their order."""
    count = min(4096, stream.samples.span)
    lengths = stream.samples.lengths(np.arange(count))
    size, place = float(lengths.mean()), stream.length
    fit = int(place // size)
    spread = f"mean {size:.0f} tokens of {count} samples, standard deviation {lengths.std():.0f}"
    if not fit:
        return f"{spread}; a block of {place} holds no whole one."
    return f"{spread}; were they equal, {fit} a block would leave {1 - fit * size / place:.1%} empty."
