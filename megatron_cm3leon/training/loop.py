"""The training loop of one rank: train on a batch, validate, log, save, roll back after a loss spike."""

import logging
import time
from pathlib import Path

from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.stream import Stream
from megatron_cm3leon.distributed.launch import gather_objects
from megatron_cm3leon.engine.base import Engine, StepMetrics
from megatron_cm3leon.monitoring.history import NON_FINITE
from megatron_cm3leon.monitoring.metrics import MetricsLogger, plain
from megatron_cm3leon.runtime.attempt import Attempt, StopReason
from megatron_cm3leon.runtime.stragglers import StragglerWatch
from megatron_cm3leon.training.lr_schedule import learning_rate
from megatron_cm3leon.training.saving import RunSaver
from megatron_cm3leon.training.setup import build_loader
from megatron_cm3leon.training.spikes import SpikeGuard, skip_batches
from megatron_cm3leon.training.validation import Validation

logger = logging.getLogger(__name__)


def advance(state: TrainState, metrics: StepMetrics, config: Config) -> None:
    """Count a batch in `state`; ValueError after more than train.max_skipped non-finite ones in a row."""
    state.tokens += metrics.tokens
    state.batch += 1
    state.sequence += config.train.global_batch_size
    if metrics.stepped:
        state.step += 1
        return
    state.skipped.append(state.batch - 1)
    # Not a warning: every rank gets here, and only the first one prints messages of this level.
    logger.info(
        "batch %d: loss %.6g, gradient norm %.6g; the step was skipped on all ranks",
        state.batch - 1,
        metrics.loss,
        metrics.grad_norm,
    )
    last = state.skipped[-config.train.max_skipped - 1 :]
    if len(last) > config.train.max_skipped and last[0] == state.batch - len(last):
        raise ValueError(
            f"{len(last)} batches in a row had a non-finite loss or gradient, {last[0]} to {last[-1]}; print them "
            f"(tools/show_batch.py {Path(config.output) / 'config.yaml'} --batch {last[0]}), lower "
            f"optimizer.learning_rate or raise train.max_skipped."
        )


class TrainingLoop:
    """Trains from the state of a run to train.steps, to train.stop_after or to a signal."""

    def __init__(
        self,
        config: Config,
        attempt: Attempt,
        stream: Stream,
        engine: Engine,
        state: TrainState,
        validation: Validation | None,
        saver: RunSaver,
    ) -> None:
        self.config, self.attempt, self.stream, self.engine, self.state = config, attempt, stream, engine, state
        self.validation, self.saver = validation, saver
        self.first, self.watch, self.run_folder = attempt.first, attempt.watch, attempt.run
        self.spikes = SpikeGuard(config)
        self.stragglers = StragglerWatch(config.cluster.straggler_interval, gather_objects, self.first)
        self.last_step = min(config.train.steps, config.train.stop_after or config.train.steps)
        self.loader = build_loader(config, stream, engine, state)
        self.log: MetricsLogger | None = None
        """Of the first rank only."""

    def run(self) -> StopReason:
        """Train, save the last step and close the engine; returns why training stopped."""
        config, stopped = self.config, False
        self.saver.save_if_due(self.state)
        steps = max(0, self.last_step - self.state.step)
        with meter(steps, "training", "steps", quiet=not self.first) as progress, self.saver:
            if self.first:
                ranks, size = self.attempt.rank.world_size, self.stream.vocabulary.size
                self.log = MetricsLogger(self.run_folder, config, size, ranks, progress, self.state.step)
            self.attempt.start_steps()
            while self.state.step < self.last_step and not stopped:
                self._skip_requested()
                metrics = self._train_batch()
                if metrics.stepped and self.spikes.detects_spike(self.state, metrics.loss):
                    self._roll_back(metrics.loss)
                    continue
                self.watch.progress(f"saving at step {self.state.step}")
                self.saver.poll()
                stopped = self.attempt.stop_requested(self.state.step)
                if not stopped:
                    self.saver.save_if_due(self.state)
        self.loader.close()
        self.watch.progress(f"saving step {self.state.step}, the last one")
        self.saver.finish(self.state)
        if self.log:
            self.log.close()
        if self.state.step >= config.train.steps:
            return "finished"
        if stopped:
            logger.info("stopped at step %d after a signal; the same command continues the run", self.state.step)
        return "signal" if stopped else "stop_after"

    def _train_batch(self) -> StepMetrics:
        """Train on the next batch, validate if it is due, and log both."""
        config, state = self.config, self.state
        self.watch.progress(f"waiting for batch {state.batch}")
        started, sequence = time.perf_counter(), state.sequence
        batch, micro_batches = next(self.loader)
        assert batch == state.batch, f"the loader is at batch {batch}, the run at {state.batch}"
        waited = time.perf_counter() - started
        rate = learning_rate(config, state.step)
        self.watch.progress(f"step {state.step + 1}")
        metrics = self.engine.train_step(micro_batches, state.step, rate)
        if self.first and not metrics.stepped:
            values = {"loss": plain(metrics.loss), "grad_norm": plain(metrics.grad_norm)}
            self.attempt.record("skipped", step=state.step, batch=batch, **values)
        advance(state, metrics, config)
        state.cursor = self.loader.cursor
        seconds = time.perf_counter() - started
        extra: dict[str, object] = {} if metrics.stepped else {"skipped": NON_FINITE}
        extra |= self.stragglers.add(waited, self.engine.compute_seconds())
        if self.validation and state.step % config.validation.interval == 0:
            self.watch.progress(f"validation at step {state.step}")
            extra |= self.validation.run(self.engine)
        if self.log:
            self.log.log(
                seconds,
                attempt=state.attempt,
                step=state.step,
                batch=batch,
                first_sequence=sequence,
                sequences=config.train.global_batch_size,
                loss=metrics.loss,
                loss_text=metrics.loss_text,
                loss_image=metrics.loss_image,
                grad_norm=metrics.grad_norm,
                learning_rate=rate,
                tokens=state.tokens,
                tokens_trimmed=metrics.tokens_trimmed,
                data_seconds=waited,
                **extra,
            )
        return metrics

    def _skip_requested(self) -> None:
        """Skip the batches of train.skip_batches that would come next."""
        if requested := self.spikes.requested_from(self.state.batch):
            first, size = self.state.sequence, self.config.train.global_batch_size
            skip_batches(self.state, requested, size, "asked")
            if self.log:
                known = {"attempt": self.state.attempt, "step": self.state.step}
                self.log.log_skipped(requested, first, size, reason="asked", **known)
            self._restart_loader()

    def _roll_back(self, loss: float) -> None:
        """After a spike: load the last checkpoint and skip the batches since it."""
        self.watch.progress(f"rolling back from step {self.state.step}")
        self.saver.wait()
        spiked = self.state.step
        self.state, batches = self.spikes.roll_back(self.engine, self.state, loss)
        step = self.saver.saved = self.state.step
        if self.log:
            size = self.config.train.global_batch_size
            first, known = self.state.sequence - len(batches) * size, {"attempt": self.state.attempt, "step": step}
            self.log.log_skipped(batches, first, size, reason="spike", steps_back=spiked - step, **known)
            name, ends = step_folder(self.run_folder, step).name, [batches[0], batches[-1]]
            self.attempt.record("rollback", step=step, loss=loss, checkpoint=name, batches=ends)
        self._restart_loader()

    def _restart_loader(self) -> None:
        """Continue loading at the next batch of the state."""
        self.loader.close()
        self.loader = build_loader(self.config, self.stream, self.engine, self.state)
