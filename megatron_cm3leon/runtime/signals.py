"""StopSignals: asked to stop, a run finishes its step, saves and ends.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) to any rank set a flag there; after every step the ranks agree in one tiny
all-reduce, so that all stop at the same step. Before the first step there is nothing to save: the signal ends the rank
where it stands. So does a second SIGTERM or SIGINT more than a few seconds after the first; a launcher that forwards
what reached its ranks anyway (torchrun and SLURM both signal them) is not taken for a second one.
"""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 5.0
"""The same request, forwarded by a launcher, comes within this time."""


class StopRequested(BaseException):
    """Raised in the main thread by a signal that is to end this rank at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.name = signal.Signals(number).name


class StopSignals:
    """Handlers of this process; install() once, then start_steps() when the loop begins."""

    def __init__(self) -> None:
        self.steps_begun = False
        self.number = 0
        """The first signal that came; 0 for none."""
        self.since = 0.0

    def install(self) -> None:
        """Handle the signals from here on; one that was ignored from the outset (a background job's SIGINT) stays so.

        SIGUSR1 is taken even then: ignoring it is how it gets past a launcher that it would end.
        """
        for number in STOPPING:
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def start_steps(self) -> None:
        """From here on a first signal waits for the end of the step."""
        self.steps_begun = True

    def ignore(self) -> None:
        """From here on this process is ending by itself; a launcher that signals it too changes nothing."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        repeated = self.number and time.monotonic() - self.since < REPEAT_SECONDS
        if repeated or (self.number and number == signal.SIGUSR1):
            return
        at_once = bool(self.number) or not self.steps_begun
        self.number, self.since = number, time.monotonic()
        if at_once:
            raise StopRequested(number)

    def agree(self, device: torch.device) -> tuple[str, int] | None:
        """(signal, rank that got it) when any rank was asked to stop; the same on all of them; collective."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own = self.number * ranks + rank if self.number else 0
        if ranks > 1:
            shared = torch.tensor(own, device=device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            own = int(shared)
        if not own:
            return None
        number, rank = divmod(own, ranks)
        return signal.Signals(number).name, rank
