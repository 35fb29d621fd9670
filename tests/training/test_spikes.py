"""A loss spike: the run rolls back to the last checkpoint and skips the batches since then."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import parse_batches, validate_config
from megatron_cm3leon.data.stream.stream import build_stream
from megatron_cm3leon.engine.base import StepMetrics
from megatron_cm3leon.monitoring.events import read_events
from megatron_cm3leon.monitoring.history import read_history, read_metrics
from megatron_cm3leon.training.loop import advance
from megatron_cm3leon.training.spikes import SpikeGuard, spike_threshold
from tests.checkpoint.builders import write_checkpoint
from tests.data.corpora import make_vocabulary, write_shards
from tests.distributed.launch import ROOT
from tests.tools.call import call_tool

VOCABULARY = make_vocabulary()
GUARDED = "train.spike_width=6"
NOISE_DOCUMENT = 57
"""Number of the document with random tokens; all other documents are identical."""
YAML = """
model: {layers: 1, hidden_size: 32, heads: 4, init_std: 0.02}
data: {seq_length: 32, packing: query, workers: 1}
cm3: {probability: 0}
train: {steps: 26, global_batch_size: 4, micro_batch_size: 4, precision: fp32, threads: 1, spike_window: 5}
optimizer: {learning_rate: 0.02}
schedule: {warmup_steps: 2, name: constant}
checkpoint: {interval: 4, keep_last: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.yaml, shards/ with one document of noise, and guarded/, a run that rolled back because of it."""
    folder = tmp_path_factory.mktemp("spike")
    image_tokens = np.arange(VOCABULARY.image_start, VOCABULARY.image_start + VOCABULARY.image_tokens)
    pairs = [np.concatenate([[1, 2, 3], [VOCABULARY.break_id], image_tokens]) for _ in range(120)]
    codes = np.random.default_rng(0).integers(VOCABULARY.image_start, VOCABULARY.image_end, VOCABULARY.image_tokens)
    pairs[NOISE_DOCUMENT] = np.concatenate([[80, 61, 93], [VOCABULARY.break_id], codes])
    write_shards(folder / "shards", pairs, VOCABULARY)
    (folder / "config.yaml").write_text(YAML)
    done = train(folder, "guarded", GUARDED)
    assert done.returncode == 0, done.stderr
    return folder


def train(folder, output, *more):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = [f"output={folder / output}", f"data.shards={folder / 'shards'}"]
    command = [sys.executable, "-m", "megatron_cm3leon.train", str(folder / "config.yaml"), *paths, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)


def steps(run):
    names = ("step", "batch", "loss", "grad_norm", "tokens")
    return [tuple(line[name] for name in names) for line in read_metrics(run)]


def find_noise_batch(folder):
    config = load_config(folder / "guarded" / "config.yaml")
    validate_config(config)
    stream = build_stream(config)
    return next(b for b in range(30) if any(NOISE_DOCUMENT in sequence.documents for sequence in stream.batch(b)))


def test_the_run_equals_a_run_that_skips_the_same_batches(folder):
    noise_batch, run = find_noise_batch(folder), folder / "guarded"
    first = noise_batch // 4 * 4  # no batch was skipped before: the checkpoint of step n is before batch n
    assert 5 < first < noise_batch < 24, "the noise must come after a full window and between two checkpoints"
    skipping = train(folder, "skipping", f"train.skip_batches={first}-{noise_batch}")
    assert skipping.returncode == 0, skipping.stderr
    assert steps(run) == steps(folder / "skipping") and [line[0] for line in steps(run)] == list(range(1, 27))
    for one, other in zip(list_checkpoints(run), list_checkpoints(folder / "skipping"), strict=True):
        assert (one / "rank-00000.safetensors").read_bytes() == (other / "rank-00000.safetensors").read_bytes()
        assert CheckpointReader(one).state.cursor == CheckpointReader(other).state.cursor


def test_skipped_batches_are_recorded(folder):
    noise_batch, run = find_noise_batch(folder), folder / "guarded"
    first, state = noise_batch // 4 * 4, CheckpointReader(list_checkpoints(run)[-1]).state
    [entry] = state.skipped_ranges
    assert entry.pop("loss") > 1
    assert entry == {"step": first, "first": first, "last": noise_batch, "reason": "spike"}
    assert (state.step, state.batch) == (26, 26 + noise_batch + 1 - first) and len(state.recent_losses) == 5
    history = read_history(run)
    assert {batch for batch, (_, why) in history.items() if why == "spike"} == set(range(first, noise_batch + 1))
    assert sorted(history) == list(range(state.batch)) and history[noise_batch + 1] == (first + 1, "")
    [event] = [event for event in read_events(run) if event["event"] == "rollback"]
    assert event["checkpoint"] == f"step-{first:08d}" and event["batches"] == [first, noise_batch]
    shown = call_tool("show_batch", run, "--batch", noise_batch).stdout
    assert f"SKIPPED by this run after step {first}: the loss spiked" in shown
    assert f"batch {noise_batch + 1}: " in call_tool("show_batch", run, "--step", first + 1).stdout


@pytest.mark.slow
def test_a_resumed_run_repeats_the_rollback_and_its_records(folder):
    guarded, run = folder / "guarded", folder / "resumed"
    shutil.copytree(guarded, run)
    last = find_noise_batch(folder) // 4 * 4
    for checkpoints in (slice(-1, None), slice(last // 4, None)):  # after the rollback is recorded; before it happens
        for checkpoint in list_checkpoints(run)[checkpoints]:
            shutil.rmtree(checkpoint)
        done = train(folder, "resumed", GUARDED)
        assert done.returncode == 0, done.stderr
        assert steps(run) == steps(guarded) and read_history(run) == read_history(guarded)
        found, expected = (CheckpointReader(list_checkpoints(each)[-1]).state for each in (run, guarded))
        assert found == replace(expected, attempt=found.attempt)


def test_exceeding_max_rollbacks_ends_the_run_with_an_error_message(folder):
    done = train(folder, "limited", GUARDED, "train.max_rollbacks=0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"batch {find_noise_batch(folder)}: loss " in done.stderr
    assert "(train.max_rollbacks); print it" in done.stderr


@pytest.mark.slow
def test_a_spike_before_any_checkpoint_ends_the_run_with_an_error_message(folder):
    done = train(folder, "early", GUARDED, "checkpoint.interval=1000")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "there is no checkpoint yet to roll back to" in done.stderr
    assert f"train.skip_batches={find_noise_batch(folder)}" in done.stderr


def test_a_spike_is_a_loss_far_above_the_median_of_a_full_window():
    assert spike_threshold([1.0, 2.0, 3.0, 4.0, 100.0], 2) == pytest.approx(3 + 2 * 1.4826)
    guard = SpikeGuard(load_config(None, ["train.spike_width=10", "train.spike_window=4"]))
    state = TrainState()
    assert not any(guard.detects_spike(state, loss) for loss in (1.0, 900.0, 1.1, 0.9))
    assert not guard.detects_spike(state, 1.2) and state.recent_losses == [900.0, 1.1, 0.9, 1.2]
    assert not guard.detects_spike(state, float("nan")) and not guard.detects_spike(state, 1.0)
    assert guard.detects_spike(state, 8.0) and state.recent_losses == [1.1, 0.9, 1.2, 1.0]
    assert not SpikeGuard(load_config()).detects_spike(state, 8.0)
    assert json.loads(json.dumps(state.recent_losses)) == state.recent_losses


def test_a_rollback_after_a_change_of_the_batch_size_keeps_the_position(tmp_path, monkeypatch):
    """Batches 0 to 2 had 8 sequences, 3 and 4 have 16: the rollback at batch 5 keeps sequence 24 + 2 x 16."""
    monkeypatch.setattr("megatron_cm3leon.training.spikes.gather_objects", lambda value: [value])
    old = load_config(None, ["train.global_batch_size=8"])
    for sequence in ({"sequence": 24}, {}):  # state of this version; state of a version that counted in batches
        monkeypatch.setattr(
            TrainState, "to_dict", lambda state, more=sequence: {"step": state.step, "batch": state.batch, **more}
        )
        folder = write_checkpoint(tmp_path, step=3, config=old)
        config = load_config(None, ["train.global_batch_size=16", f"output={tmp_path}"])
        engine = SimpleNamespace(load=lambda folder: CheckpointReader(folder).state)
        state = TrainState(step=5, batch=5, sequence=56, stream="x", stream_parts={"version": 2}, attempt=2)
        restored, batches = SpikeGuard(config).roll_back(engine, state, 99.0)
        assert (restored.step, restored.batch, restored.sequence, batches) == (3, 5, 56, range(3, 5)), folder
        assert (restored.stream, restored.stream_parts, restored.attempt) == ("x", {"version": 2}, 2)


def test_a_batch_without_an_optimizer_step_counts_as_read():
    config, state = load_config(None, ["train.global_batch_size=16"]), TrainState(step=5, batch=5, sequence=56)
    nan = dict.fromkeys(("loss", "loss_text", "loss_image", "grad_norm"), float("nan"))
    advance(state, StepMetrics(**nan, tokens=7, tokens_trimmed=0, stepped=False), config)
    assert (state.batch, state.sequence, state.step, state.skipped) == (6, 72, 5, [5])


def test_skip_batches_is_parsed_as_numbers_and_ranges():
    assert parse_batches("") == []
    assert parse_batches("900, 120-320,321,4-4") == [range(4, 5), range(120, 322), range(900, 901)]
    for text in ("5-3", "a", "1-", "-1", "1,,b"):
        with pytest.raises(ValueError, match=r"train.skip_batches \(.*must be numbers and ranges"):
            parse_batches(text)
    assert load_config(None, ["train.skip_batches=7"]).train.skip_batches == "7"
