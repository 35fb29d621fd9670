"""Interruptions by a cluster: the run continues automatically, with the losses of an uninterrupted run."""

import pytest

from megatron_cm3leon.monitoring.events import read_events
from tests.history import losses
from tests.slurm.jobs import make_corpus, submit_run

pytestmark = pytest.mark.slow
RUN = ["train.steps=300", "schedule.name=constant", "checkpoint.interval=10"]
RUN += ["--ranks-per-node", 1, "--time", 10, "--signal-time", 55]
LONGER = ["train.steps=2000"]
"""The controller checks time limits twice per minute, so the run must be longer; as the learning rate is constant, its
first 300 steps are the same."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("interruptions"))


@pytest.fixture(scope="module")
def uninterrupted(cluster, corpus):
    """The losses of an uninterrupted run, submitted with the same layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        job, log = submit_run(corpus, "uninterrupted", *RUN)
    assert cluster.wait(job, seconds=240)["JobState"] == "COMPLETED", log.read_text()
    return losses(corpus / "uninterrupted")


def send_stop_signal(slurm, job):
    slurm.run("scancel", "--batch", "--signal=USR1", job)


def approach_time_limit(slurm, job):
    """Shorten the time limit, and lengthen it after the requeue: the signal arrives during the steps on any machine."""
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=1")
    slurm.wait(job, "PENDING")
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=10")


def preempt(slurm, job):
    slurm.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")


def requeue(slurm, job):
    slurm.run("scontrol", "requeue", job)


def take_node_down(slurm, job):
    slurm.kill_node("n2")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
    slurm.wait(job, "PENDING")
    slurm.start_node("n2")  # the node registers and is available again (ReturnToService=2)


@pytest.mark.parametrize(
    ("interrupt", "options", "reason"),
    [
        (send_stop_signal, [], "time limit"),
        (approach_time_limit, LONGER, "time limit"),
        (preempt, [], ""),
        (preempt, ["--partition", "grace"], "pre-emption"),
        (requeue, [], ""),
        (take_node_down, [], ""),
    ],
    ids=["signal", "time limit", "pre-emption", "pre-emption with grace", "scontrol requeue", "node down"],
)
def test_an_interrupted_run_continues_with_the_same_losses(
    slurm, corpus, uninterrupted, interrupt, options, reason, request
):
    """`reason`: why the batch script requeues the job; empty where SLURM requeues it and the script must not."""
    run = corpus / request.node.callspec.id.replace(" ", "-")
    job, log = submit_run(corpus, run.name, *RUN, *options)
    slurm.wait_for_steps(run, 60)
    interrupt(slurm, job)
    fields = slurm.wait(job, "COMPLETED", "CANCELLED", "TIMEOUT", "FAILED", seconds=240)
    assert fields["JobState"] == "COMPLETED", log.read_text()
    requeued = [event["reason"] for event in read_events(run) if event["event"] == "requeue"]
    assert requeued == ([reason] if reason else [])
    assert fields["Restarts"] == "1", log.read_text()
    assert "resumed from" in log.read_text()
    assert losses(run)[: len(uninterrupted)] == uninterrupted
