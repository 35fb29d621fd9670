"""Steps recorded once as CUDA graphs and replayed: launches, not arithmetic, dominate the step of a small model.

A graph works on the tensors it was recorded with. So a recorded step has its own cache, whose size is a multiple of
BUCKET, and its own state; both are used for every later batch of the same shape, with any prompts, seeds and
temperature. Attention over a masked cache reads a width that is a multiple of BUCKET, too, with one graph per width.

`CudaGraphs` records on a GPU; the tests have a `GraphBackend` for the CPU.
"""

import gc
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_cm3leon.generation.cache import Cache
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.step import DecodingStep, StepShape

BUCKET = 256
"""Positions; lengths of caches, and widths that attention reads, are multiples of it."""
GRAPHS_KEPT = 8
"""Recorded steps of different shapes that a decoder keeps."""
CACHE_SHARE = 0.6
"""Share of a GPU's free memory that keys and values may take."""

if TYPE_CHECKING:
    from megatron_cm3leon.generation.fused_step import FusedStep


class Replay(Protocol):
    """A recorded graph."""

    def replay(self) -> None:
        """Queue the recorded work."""


class Mark(Protocol):
    """A point in the queue of a device."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""


class GraphBackend(Protocol):
    """Records the work of a device: see `CudaGraphs`."""

    def run(self, work: Callable[[], None]) -> None: ...
    def record(self, work: Callable[[], None], beside: Replay | None = None) -> Replay: ...
    def free_bytes(self) -> int: ...
    def release(self) -> None: ...
    def mark(self) -> Mark: ...


def round_up(length: int) -> int:
    """The smallest multiple of BUCKET that is at least `length` positions."""
    return -(-length // BUCKET) * BUCKET


class CudaGraphs:
    """Records work on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> None:
        """Run the work on the stream of recordings, so that libraries load kernels and allocate workspaces."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, work: Callable[[], None], beside: Replay | None = None) -> "CudaReplay":
        """Record the work as a graph without running it; it shares scratch memory with the recorded graph `beside`.

        The two must not be replayed at the same time.
        """
        assert beside is None or isinstance(beside, CudaReplay)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        collecting = gc.isenabled()
        gc.disable()  # freeing a graph while another is recorded breaks the recording
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
        """Free memory: the driver's, and what torch's allocator holds without using it."""
        free = torch.cuda.mem_get_info(self.device)[0]
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def release(self) -> None:
        """Return the allocator's unused memory to the driver, after a cache was freed: others have other sizes."""
        torch.cuda.empty_cache()

    def mark(self) -> torch.cuda.Event:
        """An event after the work queued so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


class CudaReplay:
    """A recorded graph; `replay()` queues its work."""

    def __init__(self, graph: "torch.cuda.CUDAGraph") -> None:
        self.graph, self.replay = graph, graph.replay


class CudaGraphStep:
    """A step with its graphs, one for each width that attention reads."""

    def __init__(self, step: DecodingStep, backend: GraphBackend) -> None:
        self.step, self.backend = step, backend
        self.recorded: dict[int, Replay] = {}

    def advance(self) -> None:
        """Draw and append a token. The first call at a width runs the step before it records it."""
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

    def __init__(self, decoder: Decoder, backend: GraphBackend) -> None:
        # A proxy: the decoder refers to this, and a cycle would keep gigabytes of weights in memory.
        self.decoder, self.backend = weakref.proxy(decoder), backend
        self.fused: FusedStep | None = None
        self.kept: dict[StepShape, CudaGraphStep] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all kept steps; a new batch may use their memory."""
        return sum({id(graph.step.cache): graph.step.cache.bytes for graph in self.kept.values()}.values())

    @property
    def cache_space(self) -> float:
        """Bytes that the keys and values of all kept steps may take."""
        return CACHE_SHARE * (self.backend.free_bytes() + self.cache_bytes)

    def take(self, shape: StepShape, segment: Segment, sampling: Sampling) -> CudaGraphStep:
        """The step of this shape: a kept one, or a new one."""
        graph = self.kept.pop(shape, None)
        if graph is None:
            while len(self.kept) >= GRAPHS_KEPT:
                self._drop_oldest()
            rows = shape.sequences * (2 if sampling.needs_unconditional else 1)
            cache = self._take_cache(rows, shape.size)
            step = DecodingStep(self.decoder, shape, segment, sampling, cache, self._find_fused(rows))
            graph = CudaGraphStep(step, self.backend)
        else:
            graph.step.cache.clear()
        self.kept[shape] = graph
        return graph

    def _take_cache(self, rows: int, size: int) -> Cache:
        for graph in self.kept.values():
            cache = graph.step.cache
            if (len(cache.rows), cache.size) == (rows, size):
                cache.clear()
                return cache
        needed = rows * self.decoder.cache_bytes(size)
        while self.kept and self.cache_bytes + needed > self.cache_space:
            self._drop_oldest()
        return self.decoder.build_cache(rows, size, flat=False)

    def _find_fused(self, rows: int) -> "FusedStep | None":
        """The fused kernels for a step of `rows` rows; None without a GPU or Triton, and for too many rows."""
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
    """The decoder's recorded steps; None on a CPU, where steps are not recorded."""
    if decoder.graphs is None and decoder.device.type == "cuda":
        decoder.graphs = StepGraphs(decoder, CudaGraphs(decoder.device))
    assert decoder.graphs is None or isinstance(decoder.graphs, StepGraphs)
    return decoder.graphs
