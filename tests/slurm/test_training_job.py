"""Training jobs on a real SLURM of two virtual nodes: finished runs, failures with and without restarts."""

import sys

import pytest

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.monitoring.events import read_events
from tests.history import losses
from tests.slurm.jobs import make_corpus, submit_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize(("launcher", "ranks"), [("srun", 1), pytest.param("torchrun", 2, marks=pytest.mark.slow)])
def test_a_job_on_two_nodes_trains_to_the_end(slurm, corpus, launcher, ranks):
    job, log = submit_run(corpus, launcher, "--ranks-per-node", ranks, "--launcher", launcher, "parallel.tensor=2")
    fields = slurm.wait(job)
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "0", log.read_text()
    assert "not requeued: the run is finished." in log.read_text()
    assert [step for step, *_ in losses(corpus / launcher)] == list(range(1, 13))
    assert list_checkpoints(corpus / launcher)[-1].name == "step-00000012"


@pytest.mark.slow
def test_a_run_without_progress_is_restarted_cluster_max_restarts_times(slurm, corpus):
    """The Python interpreter of the site fails to start, which is the earliest possible failure."""
    program = "import sys; sys.exit('the node has no libcuda')"
    (corpus / "site").mkdir()
    (corpus / "site/python").write_text(
        f'#!/bin/bash\nif [[ "$*" == *megatron_cm3leon.train* ]]; then exec {sys.executable} -c "{program}"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    (corpus / "site/python").chmod(0o755)
    (corpus / "site/site.yaml").write_text(f"python: {corpus}/site/python\n")
    options = ["--ranks-per-node", 1, "--site", corpus / "site/site.yaml", "cluster.max_restarts=1"]
    job, log = submit_run(corpus, "nowhere", *options)
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "1"), log.read_text()
    assert log.read_text().count("the node has no libcuda") == 4  # two ranks, two starts
    assert "1 consecutive restarts without a new checkpoint, cluster.max_restarts is 1" in log.read_text()
    assert [event["event"] for event in read_events(corpus / "nowhere")] == ["requeue", "gave_up"]


@pytest.mark.slow
def test_an_error_that_the_user_must_fix_is_not_retried(slurm, corpus):
    job, log = submit_run(corpus, "users", "--ranks-per-node", 1, "train.stop_after=2")
    assert slurm.wait(job)["JobState"] == "COMPLETED", log.read_text()
    job, log = submit_run(corpus, "users", "--ranks-per-node", 1, "model.hidden_size=64")
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), log.read_text()
    assert "model.hidden_size (64) was 32" in log.read_text()
    assert "not requeued: the run stopped with an error that the user must fix." in log.read_text()


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(slurm, corpus):
    job, log = submit_run(corpus, "cancelled", "--ranks-per-node", 1, "train.steps=5000")
    slurm.wait_for_steps(corpus / "cancelled", 20)
    slurm.run("scancel", job)
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), log.read_text()
    assert not [event for event in read_events(corpus / "cancelled") if event["event"] == "requeue"]
