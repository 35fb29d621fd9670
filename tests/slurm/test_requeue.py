"""Whether a job is requeued: the decision, the limit of restarts, and the recorded events."""

import subprocess
import sys
import time

import pytest

from megatron_cm3leon.monitoring.events import read_events, record
from megatron_cm3leon.slurm.requeue import count_idle_restarts, decide

RUNNING = {"JobState": "RUNNING", "PreemptTime": "None"}
STOPPED_BY = {signal: [{"event": "signal", "signal": signal}, {"event": "stop", "reason": "signal"}] for signal in
              ("SIGUSR1", "SIGTERM")}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "signal", "events", "job", "decision"),
    [
        (0, "", [], RUNNING, "end 0"),
        (0, "USR1", [], RUNNING, "end 0"),
        (2, "", [], RUNNING, "end 2"),
        (2, "USR1", [], RUNNING, "end 2"),
        (75, "USR1", STOPPED_BY["SIGUSR1"], RUNNING, "requeue"),
        (138, "USR1", [], RUNNING, "requeue"),
        (75, "", STOPPED_BY["SIGUSR1"], RUNNING, "requeue"),  # scancel --signal=USR1 goes to the ranks alone
        (75, "TERM", STOPPED_BY["SIGTERM"], RUNNING, "end 75"),
        (75, "", STOPPED_BY["SIGTERM"], RUNNING, "end 75"),
        (75, "", STOPPED_BY["SIGTERM"], {"JobState": "RUNNING", "PreemptTime": "2026-11-21T11:10:49"}, "requeue"),
        (75, "TERM", STOPPED_BY["SIGTERM"], {"JobState": "COMPLETING", "PreemptTime": "None"}, "end 75"),
        (137, "", [], {"JobState": "COMPLETING"}, "end 137"),
        (137, "", [{"event": "failure", "cause": "rank 3 was killed"}], RUNNING, "requeue"),
        (1, "", [], RUNNING, "requeue"),
        # torchrun's status 1 means any failure: the events decide.
        (1, "", [{"event": "stop", "reason": "finished"}], RUNNING, "end 0"),
        (1, "USR1", STOPPED_BY["SIGUSR1"], RUNNING, "requeue"),
        (1, "", [{"event": "failure", "cause": "data.shards is empty", "status": 2}], RUNNING, "end 2"),
    ],
)
def test_decision_after_a_job_ends(status, signal, events, job, decision):
    found = decide(status, signal, events, job)
    assert ("requeue" if found.requeue else f"end {found.status}") == decision


def test_idle_restarts_are_counted_since_the_last_new_checkpoint():
    steps = [-1, 4, 4, 8, 8, 8]
    events = [{"event": "requeue", "job": "7", "step": step} for step in steps]
    assert [count_idle_restarts(events, "7", step) for step in (8, 12)] == [3, 0]
    assert count_idle_restarts(events, "8", 8) == 0  # submitted again: another job
    assert count_idle_restarts(events[:1], "7", -1) == 1


def run_requeue(run, status, since, state="RUNNING"):
    """Run the command as the batch script does; returns stdout and stderr."""
    command = [sys.executable, "-m", "megatron_cm3leon.slurm.requeue", str(run), "--status", str(status)]
    command += ["--since", str(since), "--max-restarts", "2"]
    done = subprocess.run(
        [*command, "--job", f"JobId=7 JobName=a b JobState={state} Restarts=1 PreemptTime=None"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_job_without_progress_gives_up_with_a_reason(tmp_path):
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    record(tmp_path, 3, "failure", cause="of an earlier start", status=2)
    now = time.time()
    assert [run_requeue(tmp_path, 1, now)[0] for _ in range(2)] == ["requeue\n", "requeue\n"]
    answer, stderr = run_requeue(tmp_path, 1, now)
    assert answer == "end 1\n"
    message = "2 consecutive restarts without a new checkpoint, cluster.max_restarts is 2; the last end: exit status 1"
    assert stderr.startswith(f"not requeued: {message}.")
    events = read_events(tmp_path)[1:]
    assert [event["event"] for event in events] == ["requeue", "requeue", "gave_up"]
    assert events[-1]["reason"].startswith(message)
    assert (events[0]["job"], events[0]["restarts"], events[0]["step"], events[0]["attempt"]) == ("7", 1, 4, 3)
    (tmp_path / "checkpoints/step-00000008").mkdir()
    assert run_requeue(tmp_path, 1, now)[0] == "requeue\n"


def test_a_job_that_slurm_ends_records_nothing(tmp_path):
    answer, stderr = run_requeue(tmp_path, 143, time.time(), state="COMPLETING")
    assert answer == "end 143\n" and "SLURM is ending the job (COMPLETING)" in stderr
    assert read_events(tmp_path) == []
