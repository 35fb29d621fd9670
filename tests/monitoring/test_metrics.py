"""TensorBoard events of a run: each step once, also after restarts and rollbacks."""

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.monitoring.history import NON_FINITE
from megatron_cm3leon.monitoring.metrics import MetricsLogger


@pytest.fixture
def open_log(tmp_path):
    """Opens the metrics of an attempt that continues after the given step."""
    with meter(20, "training", "steps", quiet=True) as progress:
        yield lambda step: MetricsLogger(tmp_path, Config(), 100, 1, progress, step)


def log(record, step, loss=1.0, **more):
    values = {"loss": loss, "loss_text": 1.0, "loss_image": 1.0, "learning_rate": 1e-3}
    record.log(0.1, step=step, batch=step, **values, **more)


def read_plotted(run, name):
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_steps_after_the_last_checkpoint_are_plotted_once(tmp_path, open_log):
    first = open_log(0)
    for step in range(1, 7):
        log(first, step, loss=1.0)
    first.trackers.working["tensorboard"].writer.flush()  # then killed; the last checkpoint is that of step 3
    second = open_log(3)
    for step in range(4, 9):
        log(second, step, loss=2.0)
    second.close()
    assert read_plotted(tmp_path, "loss") == [(step, 1.0 if step <= 3 else 2.0) for step in range(1, 9)]


def test_a_run_that_restarted_from_step_0_plots_only_its_own_steps(tmp_path, open_log):
    for loss in (1.0, 2.0):
        record = open_log(0)
        for step in range(1, 4):
            log(record, step, loss=loss)
        record.close()
    assert read_plotted(tmp_path, "loss") == [(step, 2.0) for step in range(1, 4)]


def test_rolled_back_steps_are_not_plotted(tmp_path, open_log):
    record = open_log(0)
    for step in range(1, 7):
        log(record, step, loss=1.0)
    record.log_skipped(range(4, 7), first_sequence=16, sequences=4, attempt=1, step=4, reason="spike", steps_back=2)
    for step in range(5, 9):
        log(record, step, loss=2.0)
    record.log_skipped(range(8, 9), first_sequence=32, sequences=4, attempt=1, step=8, reason="asked")
    log(record, 9, loss=2.0)
    record.close()
    assert read_plotted(tmp_path, "loss") == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 10)]


def test_a_batch_without_a_step_is_not_plotted(tmp_path, open_log):
    record = open_log(0)
    log(record, 1)
    log(record, 1, loss=math.nan, skipped=NON_FINITE)
    log(record, 2)
    record.close()
    assert [step for step, _ in read_plotted(tmp_path, "learning_rate")] == [1, 2]
