"""Loss guard: a spike takes the run back to its last checkpoint, and the batches in between are left out.

This is PaLM's remedy (arXiv 2204.02311 section 5.1): spikes came from certain batches met in a certain state of the
weights; begun again from a checkpoint before the spike and without those batches, training went on smoothly.

A spike is a finite loss further above the median of the last train.spike_window losses than train.spike_width robust
standard deviations (1.4826 x the median absolute deviation, which equals the standard deviation of a normal
distribution). The window travels in TrainState: a resumed run decides like one that never stopped. A run that dies
between a rollback and its next checkpoint meets the same spike again, and goes back again.
"""

import logging
import math
import statistics
from pathlib import Path

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.validation import parse_batches
from megatron_cm3leon.distributed.launch import gather_objects
from megatron_cm3leon.engine.base import Engine

logger = logging.getLogger(__name__)

NORMAL_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


def spike_threshold(losses: list[float], width: float) -> float:
    """The loss above which the next one is a spike."""
    median = statistics.median(losses)
    spread = NORMAL_DEVIATION * statistics.median(abs(loss - median) for loss in losses)
    return median + width * spread


class LossGuard:
    """Decides, alike on every rank, which batches a run leaves out."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.asked = parse_batches(config.train.skip_batches)

    def asked_from(self, batch: int) -> range:
        """Batches from `batch` on that train.skip_batches leaves out; empty when `batch` is not one of them."""
        for asked in self.asked:
            if batch in asked:
                return range(batch, asked.stop)
        return range(batch, batch)

    def sees_spike(self, state: TrainState, loss: float) -> bool:
        """Whether the loss of a step is a spike; remembers it otherwise. Never one while the window is not full."""
        options = self.config.train
        if not options.spike_width or not math.isfinite(loss):
            return False
        full = len(state.recent_losses) >= options.spike_window
        if full and loss > spike_threshold(state.recent_losses, options.spike_width):
            return True
        state.recent_losses = [*state.recent_losses, loss][-options.spike_window :]
        return False

    def roll_back(self, engine: Engine, state: TrainState, loss: float) -> tuple[TrainState, range]:
        """State of the last checkpoint, which `engine` then holds, and the batches that are left out; collective.

        No save may be under way. ValueError where there is no checkpoint, or after train.max_rollbacks to this one.
        """
        spike, run = state.batch - 1, Path(self.config.output)
        [folder, *_] = gather_objects(next(reversed(list_checkpoints(run)), None))
        what = f"batch {spike}: loss {loss:.6g} is a spike (train.spike_width={self.config.train.spike_width:g})"
        look = f"look at it (tools/show_batch.py {run} --batch {spike}), lower optimizer.learning_rate"
        if folder is None:
            raise ValueError(
                f"{what}, and there is no checkpoint yet to go back to; {look}, lower checkpoint.interval, or leave "
                f"the batch out (train.skip_batches={spike})."
            )
        back = engine.load(folder)
        before = [each for each in state.skipped_ranges if each["reason"] == "spike" and each["step"] == back.step]
        if len(before) >= self.config.train.max_rollbacks:
            raise ValueError(
                f"{what}, and the run went back to {folder} {len(before)} times without reaching a new checkpoint "
                f"(train.max_rollbacks); {look}, or go back further: rename that folder and start again."
            )
        batches = range(back.batch, state.batch)
        back.attempt, back.changes, back.skipped_ranges = state.attempt, state.changes, state.skipped_ranges
        back.stream, back.stream_parts = state.stream, state.stream_parts
        leave_out(back, batches, self.config.train.global_batch_size, "spike", loss)
        logger.info("%s; back to %s, batches %d to %d are left out", what, folder, batches[0], batches[-1])
        return back, batches


def leave_out(state: TrainState, batches: range, size: int, reason: str, loss: float | None = None) -> None:
    """Skip `batches` of `size` sequences each, which begin at the state's next one. `reason`: spike or asked."""
    entry = {"step": state.step, "first": batches[0], "last": batches[-1], "reason": reason}
    state.skipped_ranges = [*state.skipped_ranges, entry | ({} if loss is None else {"loss": loss})]
    state.batch = batches.stop
    state.sequence += len(batches) * size
