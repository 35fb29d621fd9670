"""Loss spikes: the run rolls back to its last checkpoint and skips the batches since it.

This is the remedy of PaLM (arXiv 2204.02311 section 5.1): spikes came from certain batches in combination with a
certain state of the weights; restarted from a checkpoint before the spike and without those batches, training continued
without a spike.

A spike is a finite loss that exceeds the median of the last train.spike_window losses by more than train.spike_width
robust standard deviations (1.4826 x the median absolute deviation, which equals the standard deviation of a normal
distribution). The window is part of TrainState: a resumed run decides as one that was never interrupted. A run that is
killed between a rollback and its next checkpoint reaches the same spike again and rolls back again.
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
"""Standard deviation of a normal distribution divided by its median absolute deviation."""


def spike_threshold(losses: list[float], width: float) -> float:
    """The loss above which the next loss is a spike; `width` in robust standard deviations."""
    median = statistics.median(losses)
    spread = NORMAL_DEVIATION * statistics.median(abs(loss - median) for loss in losses)
    return median + width * spread


class SpikeGuard:
    """Decides, identically on every rank, which batches a run skips."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.requested = parse_batches(config.train.skip_batches)

    def requested_from(self, batch: int) -> range:
        """Batches from `batch` on that train.skip_batches names; empty when `batch` is not one of them."""
        for requested in self.requested:
            if batch in requested:
                return range(batch, requested.stop)
        return range(batch, batch)

    def detects_spike(self, state: TrainState, loss: float) -> bool:
        """Whether the loss of a step is a spike; other losses enter the window. False until the window is full."""
        options = self.config.train
        if not options.spike_width or not math.isfinite(loss):
            return False
        full = len(state.recent_losses) >= options.spike_window
        if full and loss > spike_threshold(state.recent_losses, options.spike_width):
            return True
        state.recent_losses = [*state.recent_losses, loss][-options.spike_window :]
        return False

    def roll_back(self, engine: Engine, state: TrainState, loss: float) -> tuple[TrainState, range]:
        """Load the last checkpoint into `engine`: its state, and the batches that are skipped; collective.

        No save may be in progress. Raises ValueError where there is no checkpoint, or after train.max_rollbacks
        rollbacks to this one.
        """
        spike, run = state.batch - 1, Path(self.config.output)
        [folder, *_] = gather_objects(next(reversed(list_checkpoints(run)), None))
        what = f"batch {spike}: loss {loss:.6g} is a spike (train.spike_width={self.config.train.spike_width:g})"
        look = f"print it (tools/show_batch.py {run} --batch {spike}), lower optimizer.learning_rate"
        if folder is None:
            raise ValueError(
                f"{what}, and there is no checkpoint yet to roll back to; {look}, lower checkpoint.interval, or skip "
                f"the batch (train.skip_batches={spike})."
            )
        restored = engine.load(folder)
        before = [each for each in state.skipped_ranges if each["reason"] == "spike" and each["step"] == restored.step]
        if len(before) >= self.config.train.max_rollbacks:
            raise ValueError(
                f"{what}, and the run rolled back to {folder} {len(before)} times without reaching a new checkpoint "
                f"(train.max_rollbacks); {look}, or roll back further: rename that folder and start again."
            )
        batches = range(restored.batch, state.batch)
        restored.attempt, restored.changes, restored.skipped_ranges = state.attempt, state.changes, state.skipped_ranges
        restored.stream, restored.stream_parts = state.stream, state.stream_parts
        skip_batches(restored, batches, self.config.train.global_batch_size, "spike", loss)
        logger.info("%s; rolled back to %s, batches %d to %d are skipped", what, folder, batches[0], batches[-1])
        return restored, batches


def skip_batches(state: TrainState, batches: range, size: int, reason: str, loss: float | None = None) -> None:
    """Skip `batches` of `size` sequences each, the first of which is the next one of `state`.

    `reason`: spike, or asked (by train.skip_batches).
    """
    entry = {"step": state.step, "first": batches[0], "last": batches[-1], "reason": reason}
    state.skipped_ranges = [*state.skipped_ranges, entry | ({} if loss is None else {"loss": loss})]
    state.batch = batches.stop
    state.sequence += len(batches) * size
