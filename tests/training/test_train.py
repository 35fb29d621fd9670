"""The training command: exact resuming, and errors that stop it before process groups are created."""

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from megatron_cm3leon.checkpoint.format import hash_file, list_checkpoints
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.model.flops import flops_per_token
from megatron_cm3leon.monitoring.events import read_events
from megatron_cm3leon.monitoring.history import read_metrics
from megatron_cm3leon.training.lr_schedule import follow_rule, learning_rate
from tests.checkpoint.builders import flip_byte
from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.distributed.launch import ROOT, torchrun
from tests.history import losses

YAML = """
model: {layers: 2, hidden_size: 32, heads: 4, init_std: 0.02}
data: {seq_length: 32, packing: stream, workers: 1}
train: {steps: 30, global_batch_size: 4, micro_batch_size: 2, precision: fp32, threads: 1}
schedule: {warmup_steps: 5}
checkpoint: {interval: 4, keep_last: 2}
validation: {interval: 15, batches: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """shards/, other/ (another vocabulary), config.yaml and the run folder uninterrupted/."""
    folder = tmp_path_factory.mktemp("train")
    write_shards(folder / "shards", make_pairs(40, make_vocabulary()), make_vocabulary())
    other = make_vocabulary(text=90)
    write_shards(folder / "other", make_pairs(40, other), other)
    (folder / "config.yaml").write_text(YAML)
    done = train(folder, "uninterrupted")
    assert done.returncode == 0, done.stderr
    return folder


def build_command(folder, output, *more):
    shards = folder / "shards"
    paths = [f"output={folder / output}", f"data.shards={shards}", f"validation.shards={shards}"]
    return [sys.executable, "-m", "megatron_cm3leon.train", str(folder / "config.yaml"), *paths, *more]


def train(folder, output, *more):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        build_command(folder, output, *more), capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
    )


def test_a_run_writes_metrics_events_checkpoints_and_validation_losses(folder):
    run = folder / "uninterrupted"
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 31))
    expected_fields = "attempt step batch loss loss_text loss_image grad_norm learning_rate tokens tokens_trimmed"
    expected_fields += " tokens_per_second tflops_per_gpu step_seconds data_seconds"
    assert set(expected_fields.split()) <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(after["time"] > before["time"] for before, after in pairwise(lines))
    assert [path.name for path in list_checkpoints(run)] == ["step-00000028", "step-00000030"]
    assert (run / "latest").read_text() == "step-00000030\n"
    assert list((run / "tensorboard").iterdir())
    validated = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(validated) == [15, 30] and validated[30] < validated[15]
    assert load_config(run / "config.yaml").train.steps == 30
    (initialized,) = [event for event in read_events(run) if event["event"] == "initialize"]
    assert (initialized["weights"], initialized["seed"], initialized["step"]) == ("pcg64-erfinv-1", 1234, 0)


def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_run(folder):
    process = subprocess.Popen(
        build_command(folder, "killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    metrics = folder / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 10):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1].decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = train(folder, "killed")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert losses(folder / "killed") == losses(folder / "uninterrupted")


INTERRUPT_SAVE_OF_STEP_8 = """
import errno, os, sys, time
from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.train import main

write, action = sharded._write_fully, sys.argv.pop(1)

def stop(file, block):
    half = len(block) // 2
    if "step-00000008" in str(file.name) and file.tell():  # after the header
        write(file, block[:half])
        if action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
        time.sleep(600)
    write(file, block)

sharded._write_fully = stop
sys.exit(main(sys.argv[1:]))
"""


def build_interrupted_command(folder, output, action):
    """The training command, which writes half of the rank file of step 8; then `action`: `hang`, or `full` (disk)."""
    python, _, _, *arguments = build_command(folder, output)
    return [python, "-c", INTERRUPT_SAVE_OF_STEP_8, action, *arguments]


def test_a_run_killed_during_a_save_resumes_from_the_previous_checkpoint(folder):
    run = folder / "interrupted"
    half = run / "checkpoints/step-00000008.tmp/rank-00000.safetensors"
    log = open(folder / "interrupted.log", "w")  # noqa: SIM115 - the process writes to it
    process = subprocess.Popen(
        build_interrupted_command(folder, "interrupted", "hang"), stdout=log, stderr=log, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while not (half.exists() and len(read_metrics(run)) >= 10):  # training continued during the save
        assert process.poll() is None and time.monotonic() < deadline, (folder / "interrupted.log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in list_checkpoints(run)] == ["step-00000004"]
    done = train(folder, "interrupted")
    assert done.returncode == 0, done.stderr
    assert (
        "step-00000004 at step 4" in done.stderr
        and "step-00000008.tmp is incomplete, because the run ended" in done.stderr
    )
    assert losses(run) == losses(folder / "uninterrupted")
    assert not half.parent.exists()


def test_a_damaged_checkpoint_is_rejected_and_the_previous_one_is_suggested(folder):
    run = folder / "damaged"
    shutil.copytree(folder / "uninterrupted", run)
    before, newest = list_checkpoints(run)
    flip_byte(newest / "rank-00000.safetensors")
    rejected = train(folder, "damaged")
    assert rejected.returncode == 2 and "Traceback" not in rejected.stderr
    assert f"checkpoint {newest} is damaged: rank-00000.safetensors does not match its SHA-256" in rejected.stderr
    assert f"The previous checkpoint is {before}:" in rejected.stderr
    remedy = rejected.stderr.split("(mv ")[1].split(")")[0].split()
    subprocess.run(["mv", *remedy], check=True)
    done = train(folder, "damaged")
    assert done.returncode == 0 and "step-00000028 at step 28" in done.stderr
    assert losses(run) == losses(folder / "uninterrupted")


def test_a_full_disk_stops_the_run_with_an_error_message(folder):
    done = subprocess.run(
        build_interrupted_command(folder, "full", "full"), capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    path = folder / "full/checkpoints/step-00000008.tmp/rank-00000.safetensors"
    assert f"{path}: No space left on device; free disk space" in done.stderr
    assert "resumes from " + str(list_checkpoints(folder / "full")[-1]) in done.stderr
    assert [path.name for path in list_checkpoints(folder / "full")] == ["step-00000004"]


@pytest.mark.slow
def test_selected_checkpoints_are_kept_and_synchronous_saves_are_identical(folder):
    kept = ["checkpoint.log_spaced=true", "checkpoint.keep_last=1", "checkpoint.keep_every=12"]
    done = train(folder, "kept", *kept, "checkpoint.asynchronous=false")
    assert done.returncode == 0, done.stderr
    steps = [int(path.name[5:]) for path in list_checkpoints(folder / "kept")]
    assert steps == [0, 1, 2, 4, 8, 12, 16, 24, 30]
    assert done.stdout.rstrip().endswith(f"wrote {list_checkpoints(folder / 'kept')[-1]}")
    assert losses(folder / "kept") == losses(folder / "uninterrupted")
    asynchronous, synchronous = (list_checkpoints(folder / run)[-1] for run in ("uninterrupted", "kept"))
    for name in ("rank-00000.safetensors", "state.json", "vocab.json"):
        assert (asynchronous / name).read_bytes() == (synchronous / name).read_bytes()
    shutil.rmtree(folder / "kept/checkpoints/step-00000030")
    for step in (1, 2, 4, 8, 12, 16, 24):
        shutil.rmtree(folder / f"kept/checkpoints/step-{step:08d}")
    resumed = train(folder, "kept", *kept)
    assert resumed.returncode == 0 and "step-00000000 at step 0" in resumed.stderr
    assert losses(folder / "kept") == losses(folder / "uninterrupted")


def test_a_run_stopped_by_stop_after_resumes_with_the_same_losses(folder):
    assert train(folder, "stopped", "train.stop_after=7").returncode == 0
    assert [path.name for path in list_checkpoints(folder / "stopped")] == ["step-00000004", "step-00000007"]
    assert train(folder, "stopped").returncode == 0
    assert losses(folder / "stopped") == losses(folder / "uninterrupted")


def test_a_change_of_the_stream_requires_allow_change_and_is_recorded(folder):
    assert train(folder, "changed", "train.stop_after=1").returncode == 0
    rejected = train(folder, "changed", "cm3.probability=0.5", "train.stop_after=2")
    assert rejected.returncode == 2
    assert "cm3.probability (0.5) was 1.0" in rejected.stderr and "--allow-change cm3.probability" in rejected.stderr
    assert "Traceback" not in rejected.stderr
    wider = train(folder, "changed", "model.hidden_size=64", "train.stop_after=2")
    assert wider.returncode == 2 and "model.hidden_size (64) was 32" in wider.stderr
    allowed = train(folder, "changed", "cm3.probability=0.5", "train.stop_after=2", "--allow-change", "cm3.probability")
    assert allowed.returncode == 0, allowed.stderr
    state = (list_checkpoints(folder / "changed")[-1] / "state.json").read_text()
    assert '"field": "cm3.probability"' in state


def test_a_run_begins_with_the_weights_of_another_and_says_so(folder):
    base = folder / "uninterrupted"
    done = train(folder, "tuned", f"train.init={base}", "train.stop_after=1", "data.seq_length=24", "cm3.probability=0")
    assert done.returncode == 0, done.stderr
    checkpoint = base / "checkpoints" / "step-00000030"
    message = f"began with the weights of {checkpoint}, step 30; the first 24 of 32 learned positions are kept"
    assert done.stderr.count(message) == 1
    (initialized,) = [event for event in read_events(folder / "tuned") if event["event"] == "initialize"]
    expected = {"path": str(base), "folder": str(checkpoint), "step": 30, "base_positions": 32, "positions": "first"}
    assert initialized["init"] == {**expected, "sha256": hash_file(checkpoint / "manifest.json")}
    assert read_metrics(folder / "tuned")[0]["loss"] < read_metrics(base)[0]["loss"]
    refused = train(folder, "tuned", "train.init=other", "data.seq_length=24", "cm3.probability=0")
    assert refused.returncode == 2 and "train.init (other) is for a new run, but the run of" in refused.stderr


def test_shards_of_another_vocabulary_are_rejected_and_named(folder):
    done = train(folder, "uninterrupted", f"data.shards={folder / 'other'}", "train.steps=40")
    assert done.returncode == 2
    assert "was made with another vocabulary" in done.stderr and "text_size: 100 instead of 90" in done.stderr


def test_an_impossible_layout_is_reported_once_before_process_groups_are_created(folder):
    script = build_command(folder, "layout", "parallel.tensor=2", "parallel.pipeline=2")[1:]
    done = torchrun(3, *script, check=False)
    assert done.returncode != 0
    message = "= 4 must divide the number of ranks (3); start 4 ranks"
    assert done.stderr.count(message) == 1
    assert not (folder / "layout").exists()


def test_an_error_of_all_ranks_is_printed_once(folder):
    assert train(folder, "twice", "train.stop_after=1").returncode == 0
    script = build_command(folder, "twice", "model.hidden_size=64", "parallel.tensor=2")[1:]
    done = torchrun(2, *script, check=False)
    assert done.returncode != 0
    assert done.stderr.count("model.hidden_size (64) was 32") == 1


def test_too_many_batches_with_a_non_finite_loss_stop_the_run(folder):
    done = train(folder, "broken", "optimizer.learning_rate=1e38", "train.max_skipped=2", "schedule.warmup_steps=0")
    assert done.returncode == 2
    assert "batches in a row had a non-finite loss or gradient" in done.stderr
    assert "tools/show_batch.py" in done.stderr
    skipped = [event for event in read_events(folder / "broken") if event["event"] == "skipped"]
    assert len(skipped) == 3 and all(event["loss"] is None for event in skipped)
    assert [skipped[0]["batch"] + n for n in range(3)] == [event["batch"] for event in skipped]


def test_learning_rate_warms_up_and_decays_to_its_minimum():
    config = load_config(None, ["train.steps=20", "schedule.warmup_steps=4", "optimizer.learning_rate=1.0"])
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[11] == pytest.approx(0.1 + 0.9 * 0.5)
    config.schedule.name = "cosine"
    assert learning_rate(config, 11) == pytest.approx(0.55)
    config.schedule.name = "constant"
    assert learning_rate(config, 19) == 1.0
    config.schedule.name = "exponential"
    assert learning_rate(config, 11) == pytest.approx(0.1**0.5) and learning_rate(config, 19) == pytest.approx(0.1)
    config.schedule.name, config.schedule.decay_steps = "wsd", 4
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[3:16] == [1.0] * 13 and rates[17] == pytest.approx(0.55) and rates[19] == pytest.approx(0.1)


def test_the_rule_of_mm1_sets_learning_rate_and_weight_decay():
    config = load_config(None, ["optimizer.rule=mm1"])
    follow_rule(config, 3_000_000_000)
    assert config.optimizer.learning_rate == pytest.approx(6e-5, rel=0.05)  # the value in the paper for 3B parameters
    assert config.optimizer.weight_decay == pytest.approx(0.1 * config.optimizer.learning_rate)
    config = load_config()
    follow_rule(config, 3_000_000_000)
    assert config.optimizer.learning_rate == 6e-4


def test_flops_per_token_equal_six_times_the_matrix_elements():
    config = load_config(None, ["model.layers=1", "model.hidden_size=8", "model.heads=1", "data.seq_length=10"])
    validate_config(config)
    assert flops_per_token(config, 100) == 6 * (4 * 64 + 8 * 64 + 800) + 6 * 10 * 8


@pytest.mark.slow
def test_deepspeed_resumes_a_megatron_checkpoint_and_prints_nothing_unexpected(folder):
    done = train(folder, "engines", "train.stop_after=16")
    assert done.returncode == 0, done.stderr
    done = train(folder, "engines", "train.engine=deepspeed", "parallel.zero=3")
    assert done.returncode == 0, done.stderr
    ignored = ("training: ", "pre-flight: 1 rank on 1 host, cpu arithmetic check passed; ")
    printed = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(ignored)]
    (kernels,) = [line for line in printed if line.startswith("kernels: ")]
    assert "AdamW: torch, fused" in kernels and "layers: not compiled" in kernels
    printed.remove(kernels)
    start, end = (folder / "engines" / "checkpoints" / f"step-000000{step}" for step in (16, 30))
    changed = "changed since step-00000016: parallel.zero 0 -> 3, train.engine megatron -> deepspeed"
    assert printed == [f"wrote {end}", changed + ", train.stop_after 16 -> 0", f"resumed from {start} at step 16"]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("deepspeed")]
    found, expected = read_metrics(folder / "engines"), read_metrics(folder / "uninterrupted")
    for name in ("loss", "validation_loss"):
        pairs = [(a[name], b[name]) for a, b in zip(found, expected, strict=True) if name in a]
        assert all(abs(a / b - 1) < 1e-6 for a, b in pairs) and len(pairs) == (30 if name == "loss" else 2)
