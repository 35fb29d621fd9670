"""tools/status.py: running, finished, failed and silent runs."""

import json
import time

import pytest

from megatron_cm3leon.monitoring.status import read_status, show_number, show_seconds
from tests.checkpoint.builders import write_checkpoint
from tests.monitoring.test_goodput import EVENTS, LINES, event, skip, step, write
from tests.tools.call import call_tool


@pytest.fixture
def run(tmp_path):
    """A run of 40 steps that is at step 4, with checkpoints of steps 1 and 2."""
    run = write(tmp_path / "run", LINES, EVENTS[:-1])
    (run / "config.yaml").write_text("train: {steps: 40}\n")
    write_checkpoint(run, 1)
    write_checkpoint(run, 2)
    return run


def test_a_running_run_is_described_in_100_columns(run):
    result = call_tool("status", run)
    assert result.returncode == 0 and max(map(len, result.stdout.splitlines())) <= 100
    shown = {line.split("  ")[1]: line for line in result.stdout.splitlines()[1:12]}
    assert result.stdout.splitlines()[0] == str(run)
    assert shown["step"].endswith("4 of 40 (10.0%)") and shown["restarts"].endswith(" 1")
    assert "step-00000002, " in shown["last checkpoint"] and ", 2 steps behind" in shown["last checkpoint"]
    assert shown["goodput"].endswith("18.6% of 43.0 s")
    assert "down            30.2%       13.0 s  #####" in result.stdout


def test_the_json_output(run):
    found = json.loads(call_tool("status", run, "--json").stdout)
    assert (found["step"], found["steps"], found["tokens"], found["restarts"]) == (4, 40, 400, 1)
    assert found["seconds_left"] == 36 * 2 and found["tokens_per_second"] == 50
    assert found["checkpoint_step"] == 2 and 0 <= found["checkpoint_age_seconds"] < 60
    assert found["seconds"]["kept"] == 8 and found["skipped"] == {}


def test_the_state_says_how_a_run_ended(run):
    assert read_status(run, now=1050).state == "running"
    silent = read_status(run, now=5000)
    assert silent.state == "silent" and silent.last_record_seconds == 5000 - 1043
    write(run, LINES, EVENTS)
    assert read_status(run, now=5000).state == "finished"
    write(run, LINES, [*EVENTS[:-1], event(1045, 2, "stop", reason="signal")])
    assert (read_status(run).state, read_status(run).why) == ("stopped", "signal")
    write(run, LINES[:4], EVENTS[:3])
    assert (read_status(run).state, read_status(run).why) == ("failed", "rank 1 on b: killed")


def test_skipped_batches_and_slow_ranks_are_counted(run):
    slow = {"slowest_rank": 3, "slowest_host": "node7", "slowest_over_median": 1.5}
    lines = [step(2, 1, 1, 0), step(4, 1, 2, 1), skip(5, 1, 1, 1), step(7, 1, 1, 2, skipped="non-finite")]
    shown = call_tool("status", write(run, [*lines, step(9, 1, 2, 3, **slow)])).stdout
    assert "skipped batches  1 spike, 1 non-finite" in shown and "slowest rank     3 on node7, 1.50 x the" in shown


def test_the_last_losses_of_validation_are_shown_by_source(run):
    losses = {
        "validation_loss": 3.25,
        "validation_loss_text": 1.0,
        "validation_vqa_loss": 2.5,
        "validation_a_loss": None,
    }
    shown = write(run, [step(2, 1, 1, 0, validation_loss=4.0), step(4, 1, 2, 1, **losses), step(5, 1, 3, 2)])
    assert "  validation       3.25, vqa 2.5 at step 2\n" in call_tool("status", shown).stdout
    found = json.loads(call_tool("status", shown, "--json").stdout)
    assert found["validation_step"] == 2 and found["validation"] == {"": 3.25, "vqa": 2.5}


def test_several_runs_make_a_table(run, tmp_path):
    other = write(tmp_path / "a-name-that-is-much-too-long-for-a-table", LINES, EVENTS)
    result = call_tool("status", run, other)
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 100 and "4/40" in lines[1] and "4/?" in lines[2]
    assert "finished" in lines[2] and lines[2].startswith("...")


def test_a_folder_without_a_run_is_an_error(tmp_path):
    result = call_tool("status", tmp_path)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {tmp_path} is not a run folder: ")
    assert call_tool("status", tmp_path, "--every", "0").returncode == 2


def test_a_folder_without_a_run_among_runs_is_reported_below_them(run, tmp_path):
    result = call_tool("status", run, tmp_path, "--json")
    assert result.returncode == 2 and f"error: {tmp_path} is not a run folder: " in result.stderr
    assert [json.loads(line)["run"] for line in result.stdout.splitlines()] == [str(run)]


def test_watching_continues_until_it_is_interrupted(run, monkeypatch):
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", wait)
    result = call_tool("status", run, "--watch", "--every", "7")
    assert result.returncode == 130 and waits == [7, 7] and result.stdout.count(f"{run}\n") == 2


def test_numbers_and_times_are_short():
    assert [show_number(number) for number in (7, 1234, 4.5e6, 1.2e12)] == ["7", "1.23 k", "4.5 M", "1.2 T"]
    assert [show_seconds(each) for each in (4.23, 123, 3600, 18720, 273600)] == [
        "4.2 s", "2 min 3 s", "1 h 0 min", "5 h 12 min", "3 d 4 h"
    ]  # fmt: skip
