"""Weights & Biases and MLflow, offline: a resumed run continues the same tracker run; missing packages are named."""

import shutil

import pytest

from megatron_cm3leon.config import validation
from megatron_cm3leon.config.loading import flatten_config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.monitoring.trackers import Trackers

TRACKED = ["monitoring.trackers=[mlflow]"]


@pytest.fixture(autouse=True)
def without_tracker_variables(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def record(run, name, steps):
    """Open a tracker that continues after the step before `steps`, log a loss for each step, and close it."""
    trackers = Trackers(run, load_config(None, [f"monitoring.trackers=[{name}]"]), steps[0] - 1)
    for step in steps:
        trackers.log(step, {"loss": 1.0 / step})
    trackers.close()
    assert list(trackers.working) == [name]


def test_mlflow_continues_one_run_in_the_run_folder(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    record(tmp_path, "mlflow", [1, 2, 3])
    record(tmp_path, "mlflow", [3, 4])
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    run_id = (tmp_path / "mlflow-run.txt").read_text().strip()
    found = [(each.step, each.value) for each in client.get_metric_history(run_id, "loss")]
    assert sorted(found) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 1 / 3), (4, 0.25)]
    run = client.get_run(run_id)
    assert run.data.params == {name: str(value) for name, value in flatten_config(load_config(None, TRACKED)).items()}
    assert run.info.status == "FINISHED"


def test_a_tracker_that_fails_is_reported_and_training_continues(tmp_path, monkeypatch, caplog):
    """A server that refuses connections, and a folder that is deleted during the run."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = load_config(None, ["monitoring.trackers=[mlflow, tensorboard]"])
    trackers = Trackers(tmp_path / "a", config, 0)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert list(trackers.working) == ["tensorboard"] and not (tmp_path / "a/mlflow-run.txt").exists()
    assert "monitoring.trackers: mlflow failed (MlflowException: " in caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "b").mkdir()
    trackers = Trackers(tmp_path / "b", load_config(None, TRACKED), 0)
    shutil.rmtree(tmp_path / "b/mlflow")
    for step in (1, 2):
        trackers.log(step, {"loss": 1.0})
    assert trackers.working == {} and caplog.text.count("mlflow failed") == 2


def test_wandb_is_offline_without_a_key_and_keeps_its_run_id(tmp_path):
    pytest.importorskip("wandb")
    record(tmp_path, "wandb", [1, 2])
    record(tmp_path, "wandb", [3])
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    assert all(path.stat().st_size > 0 for path in files)


def test_an_unknown_tracker_is_named():
    with pytest.raises(ValueError, match=r"monitoring.trackers \('tensorbord'\) must be one of: tensorboard, wandb"):
        validate_config(load_config(None, ["monitoring.trackers=[tensorboard, tensorbord]"]))


def test_a_missing_package_is_named_before_a_run_starts(monkeypatch):
    monkeypatch.setattr(validation, "find_spec", lambda name: None)
    config = load_config(None, ["monitoring.trackers=[wandb]"])
    validate_config(config)  # reading a checkpoint needs no package
    with pytest.raises(ValueError, match=r"needs the package wandb, which is not installed; run .*\[trackers\]"):
        validate_config(config, 1)
