"""The lead of the signal before a time limit, and times as sbatch writes them."""

import json

import pytest

from megatron_cm3leon.monitoring.events import record
from megatron_cm3leon.slurm.commands import parse_time
from megatron_cm3leon.slurm.signal_time import DEFAULT_SECONDS, choose_lead, measure_lead


@pytest.fixture
def run(tmp_path):
    """A run folder: steps of 10 s and one of 40 s, saves of 50 and 100 s; it needs 40 + 2 x 100 + 30 s."""
    lines = [{"attempt": 1, "batch": n, "step": n + 1, "step_seconds": 40.0 if n == 5 else 10.0} for n in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seconds in (50.0, 100.0):
        record(tmp_path, 1, "saved", step=4, checkpoint="step-00000004", seconds=seconds, bytes=1)
    return tmp_path


def test_the_lead_holds_a_step_and_two_saves(run):
    assert measure_lead(run) == 270
    assert choose_lead(run, None, 7200) == 270
    assert choose_lead(run, 600, 7200) == 600
    with pytest.raises(ValueError, match=r"--lead \(120\) must be at least 270 s: what a step and two saves"):
        choose_lead(run, 120, 7200)
    with pytest.raises(ValueError, match=r"--time \(240 s\) must be longer than the 270 s in which the run saves"):
        choose_lead(run, None, 240)


def test_batches_that_were_left_out_are_no_measurements(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"attempt": 1, "batch": 9, "step": 9, "skipped": "asked", "time": 1.0}) + "\n")
    assert measure_lead(run) == 270


def test_without_measurements_a_default_that_fits(tmp_path):
    assert measure_lead(tmp_path) is None
    assert choose_lead(tmp_path, None, 86400) == DEFAULT_SECONDS
    assert choose_lead(tmp_path, None, 60) == 15
    assert choose_lead(tmp_path, 30, 60) == 30
    with pytest.raises(ValueError, match=r"--time \(60 s\) must be longer than the 60 s"):
        choose_lead(tmp_path, 60, 60)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("1-00:00:01", 86401)],
)
def test_every_form_of_a_time_limit(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "tomorrow", "1h", "1:2:3:4", "-5", "0"])
def test_what_is_no_time_limit(text):
    with pytest.raises(ValueError, match="--time"):
        parse_time(text)


def test_these_forms_are_sbatchs(slurm):
    for text in ("5", "1:30", "24:00:00", "2-0", "1-12:30", "1-00:00:01"):
        job = slurm.run("sbatch", "--parsable", "--hold", "-o", "/dev/null", "-t", text, "--wrap", "true").strip()
        shown = parse_time(slurm.show(job)["TimeLimit"])
        slurm.run("scancel", job)
        assert shown == -(-parse_time(text) // 60) * 60  # SLURM rounds up to minutes
