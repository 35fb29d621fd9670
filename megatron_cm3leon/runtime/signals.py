"""StopSignals: on a signal to stop, a run finishes its step, saves a checkpoint and ends.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) to any rank set a flag on that rank. After every step the ranks combine their flags
in one all-reduce of 8 bytes, so that all stop at the same step. Before the first step there is nothing to save, and the
signal ends the rank immediately. So does a second SIGTERM or SIGINT that comes more than REPEAT_SECONDS after the
first; one that comes earlier is ignored, because torchrun and SLURM may both forward the same signal.
"""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 5.0
"""A signal within this time after the first is the same request, forwarded by a launcher."""


class StopRequested(BaseException):
    """Raised in the main thread by a signal that ends this rank immediately."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.name = signal.Signals(number).name


class StopSignals:
    """Signal handlers of this process: call install() once, then start_steps() when the training loop begins."""

    def __init__(self) -> None:
        self.steps_begun = False
        self.number = 0
        """Number of the first signal received; 0 if none."""
        self.since = 0.0
        """When it was received, time.monotonic()."""

    def install(self) -> None:
        """Handle the signals from now on, except one that the parent process ignored (SIGINT in a background job).

        SIGUSR1 is handled even then: batch scripts let torchrun, which it would end, ignore it.
        """
        for number in STOPPING:
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def start_steps(self) -> None:
        """From now on the first signal takes effect after the current step."""
        self.steps_begun = True

    def ignore(self) -> None:
        """Ignore further signals: this process is already ending."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated = self.number and time.monotonic() - self.since < REPEAT_SECONDS
        if repeated or (self.number and number == signal.SIGUSR1):
            return
        immediate = bool(self.number) or not self.steps_begun
        self.number, self.since = number, time.monotonic()
        if immediate:
            raise StopRequested(number)

    def agree(self, device: torch.device) -> tuple[str, int] | None:
        """(signal, rank that received it) if any rank has received one, else None; equal on all ranks; collective."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        code = self.number * ranks + rank if self.number else 0
        if ranks > 1:
            shared = torch.tensor(code, device=device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            code = int(shared)
        if not code:
            return None
        number, rank = divmod(code, ranks)
        return signal.Signals(number).name, rank
