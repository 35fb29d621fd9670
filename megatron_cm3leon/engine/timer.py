"""ComputeTimer: time that a rank computes before it waits for other ranks, on a CPU or a GPU."""

import time

import torch


class ComputeTimer:
    """Sum of the times between start() and stop() since reset()."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._intervals: list[list] = []

    def reset(self) -> None:
        """Forget all intervals."""
        self._intervals = []

    def start(self) -> None:
        """Begin an interval."""
        self._intervals.append([self._now()])

    def stop(self) -> None:
        """End the interval."""
        self._intervals[-1].append(self._now())

    def seconds(self) -> float:
        """Seconds since reset(); on a GPU this waits until the kernels before the last stop() are done."""
        if self.device.type != "cuda":
            return sum(stop - start for start, stop in self._intervals)
        for _, stop in self._intervals:
            stop.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._intervals) / 1000

    def _now(self) -> "float | torch.cuda.Event":
        """The host's time; on a GPU, whose kernels run later than they are launched, an event in its stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
