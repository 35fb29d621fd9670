"""The time of the signal before a time limit, and the formats of time limits."""

import json

import pytest

from megatron_cm3leon.monitoring.events import record
from megatron_cm3leon.slurm.commands import parse_time
from megatron_cm3leon.slurm.signal_time import DEFAULT_SECONDS, choose_signal_time, measure_signal_time


@pytest.fixture
def run(tmp_path):
    """A run folder: steps of 10 s and one of 40 s, saves of 50 and 100 s; it requires 40 + 2 x 100 + 30 s."""
    lines = [{"attempt": 1, "batch": n, "step": n + 1, "step_seconds": 40.0 if n == 5 else 10.0} for n in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seconds in (50.0, 100.0):
        record(tmp_path, 1, "saved", step=4, checkpoint="step-00000004", seconds=seconds, bytes=1)
    return tmp_path


def test_the_signal_time_covers_a_step_and_two_saves(run):
    assert measure_signal_time(run) == 270
    assert choose_signal_time(run, None, 7200) == 270
    assert choose_signal_time(run, 600, 7200) == 600
    with pytest.raises(ValueError, match=r"--signal-time \(120\) must be at least 270 s: a step and two saves"):
        choose_signal_time(run, 120, 7200)
    with pytest.raises(ValueError, match=r"--time \(240 s\) must be longer than the 270 s that the run needs"):
        choose_signal_time(run, None, 240)


def test_skipped_batches_are_not_measured(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"attempt": 1, "batch": 9, "step": 9, "skipped": "asked", "time": 1.0}) + "\n")
    assert measure_signal_time(run) == 270


def test_without_measurements_a_default_below_the_time_limit_is_used(tmp_path):
    assert measure_signal_time(tmp_path) is None
    assert choose_signal_time(tmp_path, None, 86400) == DEFAULT_SECONDS
    assert choose_signal_time(tmp_path, None, 60) == 15
    assert choose_signal_time(tmp_path, 30, 60) == 30
    with pytest.raises(ValueError, match=r"--time \(60 s\) must be longer than the 60 s"):
        choose_signal_time(tmp_path, 60, 60)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("1-00:00:01", 86401)],
)
def test_every_format_of_a_time_limit_is_parsed(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "tomorrow", "1h", "1:2:3:4", "-5", "0"])
def test_invalid_time_limits_are_rejected(text):
    with pytest.raises(ValueError, match="--time"):
        parse_time(text)


def test_sbatch_parses_these_formats_in_the_same_way(slurm):
    for text in ("5", "1:30", "24:00:00", "2-0", "1-12:30", "1-00:00:01"):
        job = slurm.run("sbatch", "--parsable", "--hold", "-o", "/dev/null", "-t", text, "--wrap", "true").strip()
        shown = parse_time(slurm.show(job)["TimeLimit"])
        slurm.run("scancel", job)
        assert shown == -(-parse_time(text) // 60) * 60  # SLURM rounds up to minutes
