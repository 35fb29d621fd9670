"""Packing report: what the sequences of a stream hold, and what the packing pads or cuts."""

from dataclasses import dataclass

import numpy as np

from megatron_cm3leon.data.stream.stream import Stream

_SEQUENCES_AT_ONCE = 256


@dataclass
class PackingStats:
    """Sums over some sequences of a stream."""

    sequences: int = 0
    tokens: int = 0
    """Tokens of all sequences, with padding."""
    padding: int = 0
    """<pad> tokens."""
    trimmed: int = 0
    """Tokens cut by the packing or because masking adds tokens."""
    spans: int = 0
    """Moved spans."""
    queries: int = 0
    """Query documents, or parts of one, in these sequences."""
    complete: int = 0
    """Query documents that are complete in one sequence, before masking."""
    retrieved: int = 0
    """Retrieved documents, or parts of one."""


def measure_packing(stream: Stream, start: int, count: int) -> PackingStats:
    """Count the contents of sequences start..start+count-1."""
    stats, vocabulary = PackingStats(), stream.vocabulary
    for first in range(start, start + count, _SEQUENCES_AT_ONCE):
        plan = stream.plan(np.arange(first, min(first + _SEQUENCES_AT_ONCE, start + count)))
        batch, layout = stream.fill(plan), plan.layout
        stats.sequences += len(layout.numbers)
        stats.tokens += batch.tokens.size
        stats.padding += int((batch.tokens == vocabulary.pad).sum())
        stats.trimmed += int(batch.trimmed.sum())
        stats.spans += int((batch.tokens == vocabulary.eoss).sum())
        inside = (layout.starts >= 0) & (layout.starts + layout.lengths <= layout.filled[layout.rows])
        complete = inside & ~layout.shortened & ~layout.retrieved
        stats.queries += int((~layout.retrieved).sum())
        stats.complete += int(complete.sum())
        stats.retrieved += int(layout.retrieved.sum())
    return stats


def describe_packing(stream: Stream, start: int, count: int) -> str:
    """The report as text."""
    stats, packing = measure_packing(stream, start, count), stream.config.data.packing
    lines = [
        f"sequences {start}..{start + count - 1} under packing={packing}, {stream.length} tokens each",
        f"  padding   {stats.padding} tokens, {stats.padding / stats.tokens:.2%}",
        f"  trimmed   {stats.trimmed} tokens, {stats.trimmed / stats.tokens:.2%} of the length",
        f"  spans     {stats.spans} moved, {stats.spans / stats.sequences:.2f} per sequence",
        f"  queries   {stats.complete} complete of {stats.queries} that have tokens in these sequences",
        f"  retrieved {stats.retrieved}, {stats.retrieved / max(1, stats.queries):.2f} per query",
        f"  complete samples: {_estimate_padding(stream)}",
        *(f"  {problem}" for problem in stream.report_problems()),
    ]
    return "\n".join(lines)


def _estimate_padding(stream: Stream) -> str:
    """The padding of complete samples if all had the mean length."""
    count = min(4096, stream.samples.span)
    lengths = stream.samples.lengths(np.arange(count))
    mean, room = float(lengths.mean()), stream.length
    fit = int(room // mean)
    spread = f"mean {mean:.0f} tokens of {count} samples, standard deviation {lengths.std():.0f}"
    if not fit:
        return f"{spread}; no complete one fits into a sequence of {room}."
    return f"{spread}; if all had the mean length, {fit} per sequence would leave {1 - fit * mean / room:.1%} empty."
