"""Training jobs on a real SLURM of two virtual nodes."""

import re
from pathlib import Path

import pytest

from megatron_cm3leon.checkpoint.sharded import list_checkpoints
from megatron_cm3leon.data.history import read_metrics
from tests.tools.call import call_tool


def submit(corpus, output, *more):
    """Submit a run of two nodes; (number of the job, its log)."""
    arguments = [f"output={corpus / output}", "--nodes", 2, "--time", 5]
    done = call_tool("submit", "train", corpus / "config.yaml", *arguments, *more)
    assert done.returncode == 0, done.stderr
    job, log = re.fullmatch(r"job (\d+): (.*)\n", done.stdout).groups()
    return int(job), Path(log)


@pytest.mark.parametrize(("launcher", "ranks"), [("srun", 1), ("torchrun", 2)])
def test_a_job_on_two_nodes_trains_to_the_end(slurm, corpus, launcher, ranks):
    output = f"{launcher}-{ranks}"
    job, log = submit(corpus, output, "--ranks-per-node", ranks, "--launcher", launcher)
    fields = slurm.wait(job)
    text = log.read_text()
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "0", text
    assert "not requeued: the run is finished." in text
    assert [line["step"] for line in read_metrics(corpus / output)] == list(range(1, 13))
    assert list_checkpoints(corpus / output)[-1].name == "step-00000012"
