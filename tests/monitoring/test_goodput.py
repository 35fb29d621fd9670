"""Time breakdown of runs, from records written by hand."""

import json

import pytest

from benchmarks.failure_simulation import replay
from megatron_cm3leon.monitoring.goodput import read_time_breakdown


def step(time, attempt, number, batch, seconds=2.0, **more):
    line = {"attempt": attempt, "step": number, "batch": batch, "loss": 3.0, "step_seconds": seconds, "time": time}
    return line | {"tokens": 100 * number, "tokens_per_second": 50.0} | more


def skip(time, attempt, number, batch):
    return {"attempt": attempt, "step": number, "batch": batch, "skipped": "spike", "time": time}


def event(time, attempt, name, **more):
    return {"time": time, "attempt": attempt, "event": name, **more}


def write(run, lines, events=()):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if events:
        (run / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    return run


LINES = [
    *[step(1010 + 2 * n, 1, n, n - 1) for n in (1, 2, 3)],  # from 1010 to 1016
    step(1019, 1, 4, 3),  # a save of one second before it
    step(1041, 2, 3, 2),  # from the checkpoint of step 2
    step(1043, 2, 4, 3),
]
EVENTS = [
    event(1000, 1, "start"),
    event(1016.5, 1, "saved", checkpoint="step-00000002", seconds=0.5),
    event(1020, 1, "failure", rank=1, host="b", cause="killed"),
    event(1025, 1, "requeue"),
    event(1033, 2, "start"),
    event(1045, 2, "stop", reason="finished"),
]


def test_the_parts_sum_to_the_wall_time(tmp_path):
    times = read_time_breakdown(write(tmp_path / "run", LINES, EVENTS))
    expected = {"kept": 8, "lost": 4, "start-up": 10 + 6, "between": 2 + 2, "down": 13}
    assert times.seconds == expected and times.wall == 45 == sum(times.seconds.values())
    assert times.goodput == 8 / 45 and len(times.processes) == 2


def test_without_events_processes_are_found_in_the_metrics(tmp_path):
    times = read_time_breakdown(write(tmp_path / "run", LINES))
    assert times.seconds == {"kept": 8, "lost": 4, "start-up": 0, "between": 1, "down": 20}
    again = [step(1041, 1, 3, 2), step(1043, 1, 4, 3)]  # killed before the next checkpoint: the same attempt again
    same = read_time_breakdown(write(tmp_path / "same", [*LINES[:4], *again]))
    assert same.seconds == times.seconds
    assert [(line["step"], line["time"]) for line, _ in same.lines][2:] == [(3, 1041), (4, 1043)]


def test_rolled_back_steps_count_as_lost(tmp_path):
    lines = [step(2, 1, 1, 0), step(4, 1, 2, 1), step(6, 1, 3, 2)]
    lines += [skip(7, 1, 1, 1), skip(7, 1, 1, 2), step(9, 1, 2, 3), step(11, 1, 2, 4, skipped="non-finite")]
    times = read_time_breakdown(write(tmp_path / "run", lines))
    assert times.seconds == {"kept": 4, "lost": 6, "start-up": 0, "between": 1, "down": 0}
    assert len(times.processes) == 1


def test_an_attempt_without_a_step_counts_as_start_up(tmp_path):
    failed = [event(1026, 2, "start"), event(1028, 2, "failure", rank=0, host="a", cause="x")]
    events = [*EVENTS[:4], *failed, event(1033, 3, "start")]
    lines = [*LINES[:4], *(line | {"attempt": 3} for line in LINES[4:])]
    times = read_time_breakdown(write(tmp_path / "run", lines, events))
    assert len(times.processes) == 3
    assert times.seconds["start-up"] == 10 + 2 + 6 and times.seconds["down"] == 6 + 5


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has neither metrics.jsonl nor events.jsonl"):
        read_time_breakdown(tmp_path)


def test_a_simulation_with_the_failures_of_a_run_has_its_wall_time(tmp_path):
    events = [each for each in EVENTS if each["event"] != "saved"]
    found = replay(read_time_breakdown(write(tmp_path / "run", LINES, events)), steps=4, interval=2)
    assert found.failures == 1 and found.kept == 8
    assert found.wall == pytest.approx(45, rel=0.1)
