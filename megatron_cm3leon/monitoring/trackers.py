"""Trackers: where the metrics of a run go beside metrics.jsonl (monitoring.trackers).

tensorboard: event files in RUN/tensorboard. wandb: Weights & Biases; WANDB_MODE decides, and without it and without
WANDB_API_KEY the run is offline, in RUN/wandb (`wandb sync` uploads it). mlflow: MLFLOW_TRACKING_URI decides, and
without it the run is in RUN/mlflow. A resumed run continues the same run of each tracker.
"""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

from megatron_cm3leon.config.loading import Config

MLFLOW_RUN = "mlflow-run.txt"
"""File in the run folder with the number of its MLflow run."""


class Tracker(Protocol):
    """Receives the metrics of each step; used only on rank 0."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record finite values of one step."""

    def roll_back(self, step: int) -> None:
        """The run continues after `step`: later steps that were recorded are no longer valid."""

    def close(self) -> None:
        """Write what is pending and end."""


def open_trackers(run: Path, config: Config, step: int) -> list[Tracker]:
    """The trackers of monitoring.trackers for a run that continues after `step` (validate_config checks packages)."""
    kinds: dict[str, Callable[[Path, Config, int], Tracker]] = {
        "tensorboard": TensorBoardTracker,
        "wandb": WandbTracker,
        "mlflow": MlflowTracker,
    }
    return [kinds[name](run, config, step) for name in config.monitoring.trackers]


class TensorBoardTracker:
    """Event files; steps after `step` that an earlier attempt or a rolled back part of the run wrote are hidden."""

    def __init__(self, run: Path, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.open = partial(SummaryWriter, str(run / "tensorboard"))
        self.writer = self.open(purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def roll_back(self, step: int) -> None:
        """Begin a file that hides later steps of earlier files."""
        self.writer.close()
        self.writer = self.open(purge_step=step + 1)

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A Weights & Biases run whose number follows from the path of the run folder.

    Repeated steps appear twice with their own time; the x axis of the charts is `step`.
    """

    def __init__(self, run: Path, config: Config, step: int) -> None:
        import wandb

        number = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        offline = "WANDB_MODE" not in os.environ and "WANDB_API_KEY" not in os.environ
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megatron_cm3leon"), id=number, name=run.name, dir=str(run),
            resume="allow", mode="offline" if offline else None, config=asdict(config),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def roll_back(self, step: int) -> None:
        """Nothing is deleted: Weights & Biases only appends."""

    def close(self) -> None:
        self.run.finish()


class MlflowTracker:
    """An MLflow run; its number is kept in RUN/mlflow-run.txt."""

    def __init__(self, run: Path, config: Config, step: int) -> None:
        import mlflow
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:  # files, which need no database; MLflow asks for this consent since version 3.7
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            uri = (run / "mlflow").resolve().as_uri()
        self.client = mlflow.MlflowClient(uri)
        number = run / MLFLOW_RUN
        if number.is_file():
            self.run = number.read_text().strip()
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megatron_cm3leon")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.run = self.client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(f"{section}.{key}", str(value)) for section, fields in asdict(config).items()
                  if isinstance(fields, dict) for key, value in fields.items()]  # fmt: skip
        self.client.log_batch(self.run, params=params)
        number.write_text(self.run + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def roll_back(self, step: int) -> None:
        """Nothing is deleted: MLflow keeps every value of a step and shows the last."""

    def close(self) -> None:
        self.client.set_terminated(self.run)
