"""Decoding of prompts in batches: one segment after each, with both streams of guidance in the same batch.

On a GPU the steps of a batch are replays of a CUDA graph (step_graph.py), queued without waiting for the device: the
host looks every few tokens whether the sequences of a text have ended, and is never more than a few tokens ahead.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.step import BatchPrompts, DecodingStep, StepShape
from megatron_cm3leon.generation.step_graph import CudaGraphStep, StepGraphs, find_graphs, round_up

CPU_CACHE_BYTES = 4 << 30
"""Keys and values of one batch on a CPU; more prompts are decoded in several batches."""
LARGEST_BATCH = 128
"""Streams per batch on a CPU, where larger batches are not faster per token."""
LOOK_EVERY = 16
"""Tokens between two checks of whether the sequences have ended."""
SHORTEST_RECORDED = 8
"""Tokens of the shortest segment whose step is recorded: recording costs as much as a few steps."""


def decode_segments(
    decoder: Decoder, given: Sequence[list[int]], segment: Segment, sampling: Sampling, seeds: Sequence[int], **options
) -> np.ndarray:
    """Ids [prompts, segment.length] that follow each prompt, -1 after an ending token; see `decode_batches`."""
    ids = np.full((len(given), segment.length), -1, np.int64)
    for part, rows in decode_batches(decoder, given, segment, sampling, seeds, **options):
        ids[part] = rows
    return ids


def decode_batches(
    decoder: Decoder,
    given: Sequence[list[int]],
    segment: Segment,
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    unconditional: Sequence[list[int]] | None = None,
    forced: np.ndarray | None = None,
    advance: Callable[[int], None] | None = None,
    margins: np.ndarray | None = None,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields, per batch, the rows of its prompts and the ids [rows, segment.length] that follow them.

    `seeds` has one seed per prompt; that of `sampling` is not read. `unconditional` are the prompts of the second
    stream of guidance and CD-K. Ids of `forced` [prompts, segment.length] that are not -1 replace drawn ones.
    `advance(n)` is called when n more ids are generated. `margins`, fp32 [prompts, segment.length], is filled with the
    difference between the two largest values of each draw (near_ties.py). ValueError, before anything is decoded, if
    the longest prompt and the segment do not fit into the context, or `unconditional` is missing.
    """
    if not given:
        return iter(())
    if margins is not None and sampling.temperature > 0 and sampling.sampler != "gumbel-1":
        raise ValueError(f"sampler ({sampling.sampler}) has no margins; use gumbel-1, or temperature 0.")
    if sampling.needs_unconditional and unconditional is None:
        raise ValueError(
            f"guidance ({sampling.guidance}) and contrast_k ({sampling.contrast_k}) require prompts without the "
            f"condition; give `unconditional`, or set guidance to 1 and contrast_k to 0."
        )
    second = unconditional if sampling.needs_unconditional and unconditional is not None else []
    prompts = BatchPrompts(given, second, seeds, forced, margins)
    longest = max(map(len, prompts.streams))
    decoder.check_length(longest, segment.length)
    graphs = find_graphs(decoder) if segment.length >= SHORTEST_RECORDED else None
    positions = longest + segment.length - 1
    size = _choose_batch_size(decoder, graphs, len(given), positions, 2 if second else 1)

    def decode_each() -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(given), size):
            part = slice(start, start + size)
            # Nothing here may keep a batch while the next one is built: each takes most of the memory.
            if graphs is None:
                yield part, _decode_batch(decoder, prompts.part(part), segment, sampling, advance)
            else:
                shape = _recorded_shape(prompts, segment, sampling, size, round_up(positions))
                graph = graphs.take(shape, segment, sampling)
                yield part, _decode_recorded(graph, prompts.part(part), segment, sampling, advance)
                del graph

    return decode_each()


def _choose_batch_size(decoder: Decoder, graphs: StepGraphs | None, prompts: int, length: int, streams: int) -> int:
    """Prompts per batch whose keys and values, `length` positions for each stream, fit into memory."""
    if graphs is None:
        fitting = int(CPU_CACHE_BYTES // (streams * decoder.cache_bytes(length)))
        return max(1, min(fitting, LARGEST_BATCH // streams))
    fitting = max(1, int(graphs.cache_space // (streams * decoder.cache_bytes(round_up(length)))))
    batches = -(-prompts // fitting)
    return -(-prompts // batches)  # equal sizes, so that one recorded step serves all batches


def _recorded_shape(prompts: BatchPrompts, segment: Segment, sampling: Sampling, rows: int, size: int) -> StepShape:
    """Shape of a step that serves all batches of a call."""
    options = {"forced": prompts.forced is not None, "margins": prompts.margins is not None}
    return StepShape.of(segment, sampling, sequences=rows, size=size, length=size, **options)


@torch.inference_mode()
def _decode_recorded(
    graph: CudaGraphStep,
    prompts: BatchPrompts,
    segment: Segment,
    sampling: Sampling,
    advance: Callable[[int], None] | None,
) -> np.ndarray:
    """Ids [rows, segment.length], by replays of a recorded step."""
    step, length = graph.step, segment.length
    step.begin(prompts.pad(step.shape.sequences), length, sampling)
    counted, marks = 0, []
    for turn in range(length):
        step.prepare(turn)
        if turn + 1 == length:
            step.draw()
            break
        graph.advance()
        if (turn + 1) % LOOK_EVERY:
            continue
        marks.append(graph.backend.mark())
        if len(marks) > 1:
            marks.pop(0).synchronize()
        if step.has_ended():
            break
        counted = _report(advance, len(prompts.conditional), counted, turn + 1)
    _report(advance, len(prompts.conditional), counted, length)
    return _collect(step, prompts, segment)


@torch.inference_mode()
def _decode_batch(
    decoder: Decoder,
    prompts: BatchPrompts,
    segment: Segment,
    sampling: Sampling,
    advance: Callable[[int], None] | None,
) -> np.ndarray:
    """Ids [rows, segment.length], by plain steps."""
    rows, length = len(prompts.conditional), segment.length
    size = max(map(len, prompts.streams)) + length - 1
    options = {"forced": prompts.forced is not None, "margins": prompts.margins is not None}
    shape = StepShape.of(segment, sampling, sequences=rows, size=size, length=length, **options)
    cache = decoder.build_cache(len(prompts.streams), size)
    step = DecodingStep(decoder, shape, segment, sampling, cache)
    step.begin(prompts, length, sampling)
    counted = 0
    for turn in range(length):
        step.prepare(turn)
        if turn + 1 == length:
            step.draw()
            break
        cache.longest += 1
        step.advance(cache.longest, cache.ragged)
        if step.has_ended():
            break
        counted = _report(advance, rows, counted, turn + 1)
    _report(advance, rows, counted, length)
    return _collect(step, prompts, segment)


def _report(advance: Callable[[int], None] | None, rows: int, counted: int, generated: int) -> int:
    """Report the tokens per row since `counted`; returns `generated`."""
    if advance:
        advance(rows * (generated - counted))
    return generated


def _collect(step: DecodingStep, prompts: BatchPrompts, segment: Segment) -> np.ndarray:
    """The generated ids of a batch, and its margins."""
    rows, length = len(prompts.conditional), segment.length
    ids = _end_text(step.ids[:rows, :length], segment).cpu().numpy()
    if prompts.margins is not None:
        drawn = (ids >= 0) & (len(segment.allowed) > 1)
        drawn &= True if prompts.forced is None else prompts.forced < 0
        prompts.margins[:] = np.where(drawn, step.read_margins(rows, length), np.inf)
    return ids


def _end_text(ids: Tensor, segment: Segment) -> Tensor:
    """Replace the last id of text that reached its length by an ending token, so that it is well formed."""
    if segment.ends:
        last = ids[:, -1]
        ids[:, -1] = torch.where(last >= 0, segment.ends[0], last)
    return ids
