"""Decoding of prompts in batches: one segment after each, both streams of guidance side by side.

On a GPU the steps of a batch are replays of a graph (step_graph.py), queued without waiting for the device: the host
looks at the ended sequences of a text every few tokens, and never runs more than a few tokens ahead.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.step import DecodingStep, StepShape
from megatron_cm3leon.generation.step_graph import StepGraph, StepGraphs, find_graphs, round_up

CPU_CACHE_BYTES = 4 << 30
"""Keys and values of one batch on a CPU; more prompts are decoded one batch after the other."""
LARGEST_BATCH = 128
"""Streams in a batch on the CPU, where larger ones gain nothing."""
LOOK_EVERY = 16
"""Tokens between two looks at what the device has done."""
SHORTEST_RECORDED = 8
"""Tokens of the shortest segment whose step is recorded: recording costs as much as a few steps."""


def decode_segments(decoder: Decoder, given: list[list[int]], segment: Segment, *arguments, **options) -> np.ndarray:
    """Ids [prompts, segment.length] that follow each prompt, -1 after an ending token; see `decode_batches`."""
    made = np.full((len(given), segment.length), -1, np.int64)
    for part, ids in decode_batches(decoder, given, segment, *arguments, **options):
        made[part] = ids
    return made


def decode_batches(
    decoder: Decoder,
    given: list[list[int]],
    segment: Segment,
    sampling: Sampling,
    seeds: list[int],
    *,
    unconditional: list[list[int]] | None = None,
    forced: np.ndarray | None = None,
    advance: Callable[[int], None] | None = None,
    margins: np.ndarray | None = None,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Which prompts, and the ids [prompts of the batch, segment.length] that follow them, batch after batch.

    `unconditional` are the prompts of guidance's other stream. Ids of `forced` [prompts, segment.length] that are
    not -1 replace drawn ones. `advance(n)` is called with the number of further ids. `margins`, fp32 [prompts,
    segment.length], is filled with the differences of the two largest values of each draw (near_ties.py). Raises
    ValueError, at once, where the longest prompt and the segment do not fit into the decoder's context, and where
    guidance lacks `unconditional`.
    """
    if not given:
        return iter(())
    if margins is not None and sampling.temperature > 0 and sampling.sampler != "gumbel-1":
        raise ValueError(f"sampler ({sampling.sampler}) has no margins; use gumbel-1, or temperature 0.")
    if sampling.contrasted and unconditional is None:
        raise ValueError(
            f"guidance ({sampling.guidance}) and contrast_k ({sampling.contrast_k}) contrast with prompts without the "
            f"condition, and there are none; give `unconditional`, or set guidance to 1 and contrast_k to 0."
        )
    without = unconditional if sampling.contrasted else []
    longest = max(map(len, given + without))
    decoder.check_length(longest, segment.length)
    graphs = find_graphs(decoder) if segment.length >= SHORTEST_RECORDED else None
    positions = longest + segment.length - 1
    size = _batch_size(decoder, graphs, len(given), positions, 2 if without else 1)

    def batches() -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(given), size):
            part = slice(start, start + size)
            # Nothing here may hold a batch while the next one is built: each takes most of the memory.
            yield part, _decode_batch(
                decoder, graphs, given[part], without[part], segment, sampling, seeds[part],
                None if forced is None else forced[part], None if margins is None else margins[part], advance,
                rows=size if graphs else len(given[part]), positions=positions,
            )  # fmt: skip

    return batches()


def _batch_size(decoder: Decoder, graphs: StepGraphs | None, prompts: int, length: int, streams: int) -> int:
    """Prompts of a batch whose keys and values, `length` positions for each stream, fit into memory."""
    if graphs is None:
        fitting = int(CPU_CACHE_BYTES // (streams * decoder.cache_bytes(length)))
        return max(1, min(fitting, LARGEST_BATCH // streams))
    fitting = max(1, int(graphs.cache_space // (streams * decoder.cache_bytes(round_up(length)))))
    batches = -(-prompts // fitting)
    return -(-prompts // batches)  # equal ones, so that one recorded step serves all


@torch.inference_mode()
def _decode_batch(
    decoder: Decoder,
    graphs: StepGraphs | None,
    given: list,
    without: list,
    segment: Segment,
    sampling: Sampling,
    seeds: list[int],
    forced: np.ndarray | None,
    margins: np.ndarray | None,
    advance: Callable[[int], None] | None,
    rows: int,
    positions: int,
) -> np.ndarray:
    """Ids [prompts, segment.length]. The last prompt is repeated up to `rows`; a recorded cache has `positions`."""
    count, length = len(given), segment.length
    shaped = {"forced": forced is not None, "margins": margins is not None}
    again = [min(row, count - 1) for row in range(rows)]
    given, without = [given[row] for row in again], [without[row] for row in again if without]
    if graphs:
        size = round_up(positions)
        shape = StepShape.of(segment, sampling, rows, size, size, **shaped)
        graph = graphs.take(shape, segment, sampling)
        step = graph.step
    else:
        size = max(map(len, given + without)) + length - 1
        shape = StepShape.of(segment, sampling, rows, size, length, **shaped)
        cache = decoder.build_cache(len(given + without), size)
        graph, step = None, DecodingStep(decoder, shape, segment, sampling, cache)
    step.begin(
        given, without, length, sampling, [seeds[row] for row in again], None if forced is None else forced[again]
    )
    for done in _run(step, graph, length):
        if advance:
            advance(count * done)
    ids = _ended(step.ids[:count, :length], segment).cpu().numpy()
    if margins is not None:
        drawn = (ids >= 0) & (len(segment.allowed) > 1)
        drawn &= True if forced is None else forced < 0
        margins[:] = np.where(drawn, step.margins[:count, :length].cpu().numpy(), np.inf)
    return ids


def _run(step: DecodingStep, graph: StepGraph | None, length: int) -> Iterator[int]:
    """Draw `length` tokens, or until all sequences have ended; yields how many more tokens are there."""
    counted, marks = 0, []
    for turn in range(length):
        step.prepare(turn)
        if turn + 1 == length:
            step.draw()
        elif graph is None:
            cache = step.cache
            cache.longest += 1
            step.advance(cache.longest, cache.ragged)
        else:
            graph.advance()
        looks = graph is None or (turn + 1) % LOOK_EVERY == 0
        if looks and graph is not None:
            marks.append(graph.backend.mark())
            if len(marks) > 1:
                marks.pop(0).synchronize()
        finished = turn + 1 == length or (looks and step.shape.ends and bool(step.done.all()))
        if finished:
            yield length - counted
            return
        if looks:
            yield turn + 1 - counted
            counted = turn + 1


def _ended(ids: Tensor, segment: Segment) -> Tensor:
    """Text that reached its length without an ending token gets one: what is returned is well formed."""
    if segment.ends:
        last = ids[:, -1]
        ids[:, -1] = torch.where(last >= 0, segment.ends[0], last)
    return ids
