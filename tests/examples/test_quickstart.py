"""The script of the quickstart with its smallest setting: every stage, and the report."""

import json
import re
import subprocess
import sys

import pytest

from megatron_cm3leon.monitoring.events import read_events
from megatron_cm3leon.monitoring.history import read_metrics
from tests.distributed.launch import ROOT, child_environment
from tests.examples.run import run_example

ACCURACIES = {"colour", "shape", "size", "position", "background", "all"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    done = run_example("quickstart.sh", "--small", "--out", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_report_json_has_every_documented_figure(run):
    out, _ = run
    report = json.loads((out / "report.json").read_text())
    assert set(report["heldout_accuracy"]) == set(report["checker_ceiling"]) == ACCURACIES
    for name in ("caption_accuracy", "image_psnr_db", "tokens_per_second"):
        assert isinstance(report[name], float | int), name
    for name in ("loss_with_retrieval", "loss_without_retrieval"):
        assert 0 < report[name] < 20, name
    assert 0 <= report["export_max_abs_logit_diff"] <= 1e-5
    assert {"pairs", "shards", "index", "conversion", "evaluation"} <= set(report["stage_seconds"])


def test_report_html_is_self_contained(run):
    page = (run[0] / "report.html").read_text()
    assert "<img" in page and "data:image/" in page
    assert not re.findall(r"(?:src|href)=[\"']https?://", page)


def test_two_attempts_under_two_layouts_are_one_run(run):
    out, _ = run
    lines = read_metrics(out / "train")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["attempt"] for line in lines] == [1] * 6 + [2] * 6
    assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12]
    resumed = [event for event in read_events(out / "train") if event["event"] == "resume"]
    assert [event["step"] for event in resumed] == [6]
    assert (out / "train" / "latest").read_text() == "step-00000012\n"


def test_generated_and_infilled_images_and_a_batch_are_shown(run):
    out, printed = run
    for folder in ("generated", "generated-with-retrieval", "infilled"):
        assert list((out / folder).glob("*.png")), folder
    assert "=== a batch as the model sees it" in printed


def test_the_python_api_example_runs_on_the_output(run):
    out, _ = run
    command = [sys.executable, str(ROOT / "examples/python_api.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=child_environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "mean loss of the tokens of sequence 1000" in done.stdout and (out / "python-api.png").is_file()


def test_a_folder_that_the_script_did_not_write_is_not_changed(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = run_example("quickstart.sh", "--small", "--out", tmp_path)
    assert done.returncode == 2 and "was not written by this script" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_unknown_option_is_named():
    done = run_example("quickstart.sh", "--smal")
    assert done.returncode == 2 and "unknown option --smal" in done.stderr
