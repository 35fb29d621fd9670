"""Steps recorded once as a graph of a device's work and replayed: a small model's step is launches, not arithmetic.

A graph works on the tensors it was recorded with. So a recorded step has its own cache, of a bucket's size, and its own
state; both serve every later batch of the same shape, of whatever prompts, seeds and temperature. Attention over a
masked cache reads a width in buckets, too, with one graph per width.

`CudaGraphs` is what records on a GPU. Any other class with its methods can stand in its place, as in the tests.
"""

import gc
import weakref
from collections.abc import Callable
from importlib.util import find_spec

import torch

from megatron_cm3leon.generation.cache import Cache
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.step import DecodingStep, StepShape

BUCKET = 256
"""Cache lengths, and widths that attention reads, are multiples of it."""
GRAPHS_KEPT = 8
"""Recorded steps of different shapes that a decoder keeps."""
CACHE_SHARE = 0.6
"""Share of a GPU's free memory that keys and values may take."""


def round_up(length: int) -> int:
    """The bucket of a number of positions."""
    return -(-length // BUCKET) * BUCKET


class CudaGraphs:
    """Records work on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> None:
        """Do the work where it will be recorded: libraries load their kernels and take their workspaces."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, work: Callable[[], None], beside: "CudaReplay | None" = None) -> "CudaReplay":
        """The work as a graph, without doing it; of `beside`, never replayed at once, it shares scratch memory."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        collecting = gc.isenabled()
        gc.disable()  # a graph that is collected while another is recorded breaks the recording
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(*(() if beside is None else (beside.graph.pool(),)))
                try:
                    work()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return CudaReplay(graph)

    def free_bytes(self) -> int:
        """Memory that tensors can take: the driver's free memory, and what torch's allocator holds without using it."""
        free = torch.cuda.mem_get_info(self.device)[0]
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def release(self) -> None:
        """Give the allocator's unused memory back, after something large was dropped: other sizes may follow."""
        torch.cuda.empty_cache()

    def mark(self) -> torch.cuda.Event:
        """What `synchronize` waits for: the work so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


class CudaReplay:
    """A recorded graph; `replay()` queues its work."""

    def __init__(self, graph: "torch.cuda.CUDAGraph") -> None:
        self.graph, self.replay = graph, graph.replay


class StepGraph:
    """A step with its graphs, one for each width that attention reads."""

    def __init__(self, step: DecodingStep, backend) -> None:
        self.step, self.backend, self.recorded = step, backend, {}

    def advance(self) -> None:
        """Draw and append a token; the first time at a width does it before recording it."""
        cache = self.step.cache
        cache.longest += 1
        width = cache.size if self.step.fused else round_up(cache.longest)
        if width in self.recorded:
            self.recorded[width].replay()
            return

        def work() -> None:
            self.step.advance(width, True)

        self.backend.run(work)
        self.recorded[width] = self.backend.record(work, next(iter(self.recorded.values()), None))


class StepGraphs:
    """The recorded steps of a decoder: recent shapes, with their caches."""

    def __init__(self, decoder: Decoder, backend) -> None:
        # A proxy: the decoder keeps this, and must not keep itself, and gigabytes of weights, alive.
        self.decoder, self.backend, self.fused = weakref.proxy(decoder), backend, None
        self.kept: dict[StepShape, StepGraph] = {}

    @property
    def cache_bytes(self) -> int:
        """Keys and values that are kept; a new batch may take their memory."""
        return sum({id(graph.step.cache): graph.step.cache.bytes for graph in self.kept.values()}.values())

    @property
    def cache_space(self) -> float:
        """Bytes that the keys and values of all kept steps may take."""
        return CACHE_SHARE * (self.backend.free_bytes() + self.cache_bytes)

    def take(self, shape: StepShape, segment: Segment, sampling: Sampling) -> StepGraph:
        """The step of this shape, recorded before or new."""
        graph = self.kept.pop(shape, None)
        if graph is None:
            while len(self.kept) >= GRAPHS_KEPT:
                self._drop_oldest()
            rows = shape.sequences * (2 if sampling.contrasted else 1)
            cache = self._cache(rows, shape.size)
            step = DecodingStep(self.decoder, shape, segment, sampling, cache, self._find_fused(rows))
            graph = StepGraph(step, self.backend)
        else:
            graph.step.cache.clear()
        self.kept[shape] = graph
        return graph

    def _cache(self, rows: int, size: int) -> Cache:
        for graph in self.kept.values():
            cache = graph.step.cache
            if (len(cache.rows), cache.size) == (rows, size):
                cache.clear()
                return cache
        wanted = rows * self.decoder.cache_bytes(size)
        while self.kept and self.cache_bytes + wanted > self.cache_space:
            self._drop_oldest()
        return self.decoder.build_cache(rows, size, flat=False)

    def _find_fused(self, rows: int):
        """Kernels for a step of so few rows, on a GPU with Triton; None where there are none."""
        if self.decoder.device.type != "cuda" or not find_spec("triton"):
            return None
        from megatron_cm3leon.generation.fused_step import FusedStep

        if not FusedStep.fits(rows):
            return None
        if self.fused is None:
            self.fused = FusedStep(self.decoder)
        return self.fused

    def _drop_oldest(self) -> None:
        del self.kept[next(iter(self.kept))]
        self.backend.release()


def find_graphs(decoder: Decoder) -> StepGraphs | None:
    """The decoder's recorded steps; None where steps are not recorded, as on a CPU."""
    if decoder.graphs is None and decoder.device.type == "cuda":
        decoder.graphs = StepGraphs(decoder, CudaGraphs(decoder.device))
    return decoder.graphs
