"""What tests compare of the history of a run."""

from pathlib import Path

from megatron_cm3leon.monitoring.history import read_metrics


def losses(run: Path) -> list[tuple]:
    """(step, batch, loss, gradient norm) of each step."""
    return [(line["step"], line["batch"], line["loss"], line["grad_norm"]) for line in read_metrics(run)]
