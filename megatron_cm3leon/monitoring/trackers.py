"""Trackers: where the metrics of a run go beside metrics.jsonl (monitoring.trackers).

tensorboard: event files in RUN/tensorboard. wandb: Weights & Biases; WANDB_MODE decides, and without it and without
WANDB_API_KEY the run is offline, in RUN/wandb (`wandb sync` uploads it). mlflow: MLFLOW_TRACKING_URI decides, and
without it the run is in RUN/mlflow. A resumed run continues the same run of each tracker, by its number in
RUN/wandb-run.txt and RUN/mlflow-run.txt.

A tracker that fails, such as one whose server is down, does not stop training: it is reported and no longer used.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

from megatron_cm3leon.config.loading import Config, flatten_config

logger = logging.getLogger(__name__)

MAX_PARAMS = 100
"""MLflow's limit of parameters in one request."""


class Tracker(Protocol):
    """Receives the metrics of each step; used only on rank 0."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record finite values of one step."""

    def roll_back(self, step: int) -> None:
        """The run continues after `step`: later steps that were recorded are no longer valid."""

    def close(self) -> None:
        """Write what is pending and end."""


class Trackers:
    """The trackers of monitoring.trackers that work, for a run that continues after `step`."""

    def __init__(self, run: Path, config: Config, step: int) -> None:
        """Open them; validate_config has checked that their packages are installed."""
        self.working: dict[str, Tracker] = {}
        for name in config.monitoring.trackers:
            self._try(name, partial(self._open, name, run, config, step))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record finite values of one step."""
        self._call(lambda tracker: tracker.log(step, values))

    def roll_back(self, step: int) -> None:
        """The run continues after `step`."""
        self._call(lambda tracker: tracker.roll_back(step))

    def close(self) -> None:
        """Write what is pending and end."""
        self._call(lambda tracker: tracker.close())

    def _open(self, name: str, run: Path, config: Config, step: int) -> None:
        kinds: dict[str, Callable[[Path, Config, int], Tracker]] = {
            "tensorboard": TensorBoardTracker,
            "wandb": WandbTracker,
            "mlflow": MlflowTracker,
        }
        self.working[name] = kinds[name](run, config, step)

    def _call(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.working.items()):
            self._try(name, partial(action, tracker))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # each library has its own; metrics.jsonl has every number, so training continues
            self.working.pop(name, None)
            first_line = (str(error).splitlines() or [""])[0]
            logger.warning(
                "monitoring.trackers: %s failed (%s: %s) and is not used until the next start of this run; "
                "metrics.jsonl has all metrics",
                name, type(error).__name__, first_line,
            )  # fmt: skip


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
    """A Weights & Biases run. Repeated steps appear twice with their own time; the x axis of the charts is `step`."""

    def __init__(self, run: Path, config: Config, step: int) -> None:
        import wandb

        number = _recall_number(run / "wandb-run.txt", lambda: uuid.uuid4().hex[:16])
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
    """An MLflow run, with the configuration as its parameters."""

    def __init__(self, run: Path, config: Config, step: int) -> None:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:  # files, which need no database; since version 3.7 MLflow requires this consent
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            uri = (run / "mlflow").resolve().as_uri()
        self.client = mlflow.MlflowClient(uri)
        self.run = _recall_number(run / "mlflow-run.txt", lambda: self._create_run(run.name, config))

    def _create_run(self, name: str, config: Config) -> str:
        from mlflow.entities import Param

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megatron_cm3leon")
        found = self.client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
        number = self.client.create_run(experiment_id, run_name=name).info.run_id
        params = [Param(field, str(value)) for field, value in flatten_config(config).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(number, params=params[start : start + MAX_PARAMS])
        return number

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def roll_back(self, step: int) -> None:
        """Nothing is deleted: MLflow keeps every value of a step and shows the last."""

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _recall_number(path: Path, create: Callable[[], str]) -> str:
    """The number that an earlier attempt wrote to `path`; a new one for a new run."""
    if path.is_file():
        return path.read_text().strip()
    number = create()
    path.write_text(number + "\n")
    return number
