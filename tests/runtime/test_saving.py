"""A run that gets a stop signal saves first: no step is repeated, for all sources of the signal and both launchers."""

import pytest

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.monitoring.events import read_events
from tests.history import losses
from tests.slurm.jobs import make_corpus, submit_run

pytestmark = pytest.mark.slow
# No regular checkpoint is due: the only checkpoints are those at the stop and at the end.
RUN = ["train.steps=300", "checkpoint.interval=1000", "--ranks-per-node", 1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("saving"))


def send_stop_signal(slurm, job):
    slurm.run("scancel", "--batch", "--signal=USR1", job)


def preempt(slurm, job):
    slurm.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")


@pytest.mark.parametrize(
    ("interrupt", "partition"), [(send_stop_signal, "main"), (preempt, "main"), (preempt, "grace")]
)
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_no_step_is_repeated_after_a_stop(slurm, corpus, launcher, interrupt, partition):
    run = corpus / f"{launcher}-{interrupt.__name__}-{partition}"
    job, log = submit_run(corpus, run.name, *RUN, "--launcher", launcher, "--partition", partition)
    slurm.wait_for_steps(run, 60)
    interrupt(slurm, job)
    fields = slurm.wait(job, "COMPLETED", "CANCELLED", "TIMEOUT", "FAILED", seconds=240)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 300 == len(losses(run)), log.read_text()
    stops = [event for event in read_events(run) if event["event"] == "stop"]
    assert [event["reason"] for event in stops] == ["signal", "finished"]
    assert len(list_checkpoints(run)) == 2


def test_a_cancelled_run_has_saved_and_continues_with_the_same_command(slurm, corpus):
    run = corpus / "cancelled"
    job, log = submit_run(corpus, run.name, *RUN)
    slurm.wait_for_steps(run, 60)
    slurm.run("scancel", job)
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), log.read_text()
    assert len(list_checkpoints(run)) == 1
    job, log = submit_run(corpus, run.name, *RUN)
    assert slurm.wait(job)["JobState"] == "COMPLETED", log.read_text()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 300
