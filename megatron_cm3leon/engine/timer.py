"""WorkClock: how long one rank works before it waits for others, on a CPU or in a GPU's queue."""

import time

import torch


class WorkClock:
    """Adds up the time between start() and stop()."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[list] = []

    def reset(self) -> None:
        self._parts = []

    def start(self) -> None:
        self._parts.append([self._now()])

    def stop(self) -> None:
        self._parts[-1].append(self._now())

    def seconds(self) -> float:
        """Seconds since reset(); on a GPU it waits until the last stop() has been passed."""
        if self.device.type != "cuda":
            return sum(stop - start for start, stop in self._parts)
        for _, stop in self._parts:
            stop.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._parts) / 1000

    def _now(self):
        """The host runs ahead of a GPU: there the moment is a mark in its queue."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
