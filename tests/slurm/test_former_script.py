"""A job script that was submitted before version 0.1.0 still starts, requeues and finishes its run."""

import sys
from pathlib import Path

import pytest

from megatron_cm3leon.config.loading import load_config, save_config
from megatron_cm3leon.monitoring.events import read_events
from tests.distributed.launch import ROOT
from tests.history import losses
from tests.slurm.jobs import make_corpus

SCRIPT = Path(__file__).parents[1] / "golden/ad3992f-train.sbatch"
"""Output of `tools/submit.py train ... --print` at commit ad3992f; its paths are placeholders."""


@pytest.mark.slow
def test_an_old_job_script_requeues_with_the_old_command_name(slurm, tmp_path):
    corpus, run = make_corpus(tmp_path), tmp_path / "run"
    (run / "submit").mkdir(parents=True)
    options = ["train.steps=150", "schedule.name=constant", "checkpoint.interval=10", f"output={run}"]
    save_config(load_config(corpus / "config.yaml", options), run / "submit/001.yaml")
    text = SCRIPT.read_text()
    for name, value in (("@RUN@", run), ("@ROOT@", ROOT), ("@PYTHON@", sys.executable)):
        text = text.replace(name, str(value))
    (run / "submit/001.sbatch").write_text(text)
    job = slurm.run("sbatch", "--parsable", run / "submit/001.sbatch").strip()
    slurm.wait_for_steps(run, 30)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    fields = slurm.wait(job, seconds=240)
    log = (run / f"submit/{job}.log").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert [event["reason"] for event in read_events(run) if event["event"] == "requeue"] == ["time limit"]
    assert "resumed from" in log and [step for step, *_ in losses(run)] == list(range(1, 151))
