"""Measure times on the device: of calls, of replays of a captured graph and of kernels; and the memory bandwidth."""

import statistics
import time
from collections.abc import Callable

import torch

READ_BYTES = 2 << 30
"""Bytes that are read to measure the memory bandwidth: much more than a cache holds."""


def time_call(call: Callable[[], object], rounds: int = 10, warm_up: int = 3) -> float:
    """Seconds of one call: the median of `rounds` calls; on a CPU, of a single call."""
    for _ in range(warm_up):
        call()
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def time_graph(call: Callable[[], object], rounds: int = 20) -> float:
    """Seconds of one replay of a graph with all kernels of `call`; on a CPU, of a call."""
    if not torch.cuda.is_available():
        return time_call(call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_call(graph.replay, rounds)


def list_kernels(call: Callable[[], object], steps: int = 1, longest: int = 30) -> dict:
    """`kernels`: [name, calls per step, ms per step] of the longest kernels; `kernel_ms`: of all kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.self_device_time_total > 0]
    rows = [(event.self_device_time_total / 1e3 / steps, event.count / steps, event.key) for event in events]
    rows.sort(reverse=True)
    shown = [[name[:110], count, ms] for ms, count, name in rows[:longest]]
    return {"kernels": shown, "kernel_ms": sum(ms for ms, _, _ in rows)}


def measure_read_rate(device: torch.device) -> float:
    """Bytes per second that a sum reads: the upper bound of a decoding step."""
    source = torch.ones(READ_BYTES // 4 if device.type == "cuda" else 1 << 22, dtype=torch.int32, device=device)
    return source.nbytes / time_call(lambda: source.sum(dtype=torch.int32), 12)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference divided by the norm of the expected tensor."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return float((found - expected).norm() / expected.norm())
