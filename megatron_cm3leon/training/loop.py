"""The training loop, as one rank runs it."""

import logging
import time
from pathlib import Path

from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config, save_config
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.data.stream.stream import Stream, build_stream
from megatron_cm3leon.distributed.launch import gather_objects
from megatron_cm3leon.engine.base import Engine, StepMetrics
from megatron_cm3leon.model.initialization import VERSION as INITIAL_WEIGHTS
from megatron_cm3leon.model.weights import count_parameters
from megatron_cm3leon.monitoring.history import NON_FINITE
from megatron_cm3leon.monitoring.metrics import MetricsLogger, plain
from megatron_cm3leon.runtime.attempt import Attempt
from megatron_cm3leon.runtime.stragglers import StragglerWatch
from megatron_cm3leon.training.lr_schedule import follow_rule, learning_rate
from megatron_cm3leon.training.saving import RunSaver
from megatron_cm3leon.training.setup import open_run
from megatron_cm3leon.training.spikes import LossGuard, leave_out

logger = logging.getLogger(__name__)


def build_loader(config: Config, stream: Stream, engine: Engine, state: TrainState) -> Loader:
    """The loader of this rank's part of the batches from the position of `state` on."""
    return Loader(
        stream,
        rank=engine.data_rank,
        size=engine.data_size,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        start_batch=state.batch,
        start_sequence=state.sequence,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=engine.device.type == "cuda",
    )


class Validation:
    """The same held-out batches each time, with and without retrieved documents."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.streams = {"validation": build_stream(config, train=False)}
        if config.validation.index:
            self.streams["validation_without_retrieval"] = build_stream(config, train=False, retrieval=False)

    def run(self, engine: Engine) -> dict[str, float]:
        """Mean losses over the batches, named as metrics.jsonl has them."""
        losses = {}
        for name, stream in self.streams.items():
            loader = build_loader(self.config, stream, engine, TrainState())
            metrics = [engine.eval_step(next(loader)[1]) for _ in range(self.config.validation.batches)]
            loader.close()
            for field in ("loss", "loss_text", "loss_image"):
                losses[f"{name}_{field}"] = sum(getattr(each, field) for each in metrics) / len(metrics)
        return losses


def advance(state: TrainState, metrics: StepMetrics, config: Config) -> None:
    """Count the batch; ValueError after too many non-finite ones in a row."""
    state.tokens += metrics.tokens
    state.batch += 1
    state.sequence += config.train.global_batch_size
    if metrics.stepped:
        state.step += 1
        return
    state.skipped.append(state.batch - 1)
    # Below a warning: every rank knows it, the first one shows messages of this level.
    logger.info(
        "batch %d: loss %.6g, gradient norm %.6g; no rank stepped", state.batch - 1, metrics.loss, metrics.grad_norm
    )
    last = state.skipped[-config.train.max_skipped - 1 :]
    if len(last) > config.train.max_skipped and last[0] == state.batch - len(last):
        raise ValueError(
            f"{len(last)} batches in a row had a non-finite loss or gradient, {last[0]} to {last[-1]}; look at them "
            f"(tools/show_batch.py {Path(config.output) / 'config.yaml'} --batch {last[0]}), lower "
            f"optimizer.learning_rate or raise train.max_skipped."
        )


class Training:
    """A run from where it stands to train.steps, to train.stop_after or to a signal."""

    def __init__(self, config: Config, attempt: Attempt, allowed: list[str]) -> None:
        """Opens data, model and checkpoint; `allowed` fields may differ from the checkpoint's."""
        self.config, self.attempt, self.run = config, attempt, attempt.run
        self.first, self.watch = attempt.first, attempt.watch
        self.watch.progress("opening the data")
        self.stream = build_stream(config)
        follow_rule(config, count_parameters(config, self.stream.vocabulary.size))
        self.watch.progress("building the model and loading a checkpoint")
        self.engine, self.state, resumed = open_run(config, self.stream, attempt.device, allowed)
        self.state.attempt = attempt.number
        self.watch.progress("opening the validation data")
        self.validation = Validation(config) if config.validation.interval else None
        if self.first:
            save_config(config, self.run / "config.yaml")
            if resumed:
                attempt.record("resume", step=self.state.step, checkpoint=resumed.name)
            else:
                attempt.record("initialize", step=0, weights=INITIAL_WEIGHTS, seed=config.seed)
        self.guard = LossGuard(config)
        self.stragglers = StragglerWatch(config.cluster.straggler_interval, gather_objects, self.first)
        self.saver = RunSaver(self.engine, config, self.first, saved=self.state.step if resumed else None)
        self.end = min(config.train.steps, config.train.stop_after or config.train.steps)
        self.log: MetricsLogger | None = None
        """The first rank's."""

    def train(self) -> tuple[str, int]:
        """Run the loop; returns why it ended (finished, stop_after, signal), and the step."""
        config, stopped = self.config, False
        self.saver.save_if_due(self.state)
        self.loader = build_loader(config, self.stream, self.engine, self.state)
        steps = max(0, self.end - self.state.step)
        with meter(steps, "training", "steps", quiet=not self.first) as progress, self.saver:
            if self.first:
                ranks = self.attempt.rank.world_size
                size = self.stream.vocabulary.size
                self.log = MetricsLogger(self.run, config, size, ranks, progress, self.state.step)
            self.attempt.start_steps()
            while self.state.step < self.end and not stopped:
                self._leave_out_asked()
                metrics = self._take_batch()
                if metrics.stepped and self.guard.sees_spike(self.state, metrics.loss):
                    self._roll_back(metrics.loss)
                    continue
                self.watch.progress(f"saving at step {self.state.step}")
                self.saver.poll()
                stopped = self.attempt.stop_asked(self.state.step)
                if not stopped:
                    self.saver.save_if_due(self.state)
        self.loader.close()
        self.watch.progress(f"saving step {self.state.step}, the last one")
        folder = self.saver.finish(self.state)
        if self.log:
            self.log.close()
            print(f"wrote {folder}")
        if self.state.step >= config.train.steps:
            return "finished", self.state.step
        if stopped:
            logger.info("stopped at step %d as a signal asked for; the same command goes on", self.state.step)
        return "signal" if stopped else "stop_after", self.state.step

    def _take_batch(self) -> StepMetrics:
        """Train on the next batch, validate where that is due, and log both."""
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
        extra = {} if metrics.stepped else {"skipped": NON_FINITE}
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

    def _leave_out_asked(self) -> None:
        """Go past the batches of train.skip_batches that would come next."""
        if asked := self.guard.asked_from(self.state.batch):
            first, size = self.state.sequence, self.config.train.global_batch_size
            leave_out(self.state, asked, size, "asked")
            if self.log:
                self.log.leave_out(asked, first, size, attempt=self.state.attempt, step=self.state.step, reason="asked")
            self._restart_loader()

    def _roll_back(self, loss: float) -> None:
        """After a spike: back to the last checkpoint, past the batches in between."""
        self.watch.progress(f"going back from step {self.state.step}")
        self.saver.wait()
        spiked = self.state.step
        self.state, batches = self.guard.roll_back(self.engine, self.state, loss)
        step = self.saver.saved = self.state.step
        if self.log:
            size = self.config.train.global_batch_size
            first, known = self.state.sequence - len(batches) * size, {"attempt": self.state.attempt, "step": step}
            self.log.leave_out(batches, first, size, reason="spike", steps_back=spiked - step, **known)
            name, ends = step_folder(self.run, step).name, [batches[0], batches[-1]]
            self.attempt.record("rollback", step=step, loss=loss, checkpoint=name, batches=ends)
        self._restart_loader()

    def _restart_loader(self) -> None:
        """Begin at the state's next batch."""
        self.loader.close()
        self.loader = build_loader(self.config, self.stream, self.engine, self.state)
