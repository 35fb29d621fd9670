"""The steps of a run, from its metrics.jsonl.

A batch with a non-finite loss or gradient is skipped: its line has the step number of the line before it. So does the
line of a batch that was skipped after a loss spike or by train.skip_batches; it replaces the line of the step that was
rolled back. An attempt that resumes from a checkpoint replaces the lines of earlier attempts from its first batch on.
Batch numbers continue when the batch size changes; positions.py finds the sequences of a batch.
"""

from collections.abc import Iterable
from pathlib import Path

from megatron_cm3leon.common.jsonl import parse_lines

METRICS = "metrics.jsonl"
NON_FINITE = "non-finite"
REASONS = {
    NON_FINITE: "its loss or gradient was not finite",
    "spike": "the loss spiked, and the run rolled back to an earlier checkpoint",
    "asked": "train.skip_batches lists it",
}
"""Value of the key `skipped` -> why the batch was skipped, in words."""


def read_lines(run: str | Path) -> list[tuple[dict, bool]]:
    """Latest line of each batch, and whether the batch was skipped; ValueError for a folder without metrics.jsonl."""
    path = Path(run) / METRICS
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no {METRICS}; give the folder of a run's output=...")
    return select_latest(parse_lines(path))


def select_latest(written: Iterable[dict]) -> list[tuple[dict, bool]]:
    """Latest valid line per batch (earlier ones are superseded) by batch, and whether the batch was skipped."""
    lines: dict[int, dict] = {}
    last = None
    for line in written:
        if last and (line["attempt"] != last["attempt"] or line["batch"] <= last["batch"]):
            lines = {batch: lines[batch] for batch in lines if batch < line["batch"]}
        last = lines[line["batch"]] = line
    ordered = [lines[batch] for batch in sorted(lines)]
    before = [0, *(line["step"] for line in ordered)]
    return [(line, line["step"] == step) for line, step in zip(ordered, before, strict=False)]


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run's steps in order, without those of skipped batches; ValueError as read_lines()."""
    return [line for line, skipped in read_lines(run) if not skipped]


def read_history(run: str | Path) -> dict[int, tuple[int, str]]:
    """Batch -> (step, reason for which it was skipped, a key of REASONS, or empty); ValueError as read_lines()."""
    return {
        line["batch"]: (line["step"], line.get("skipped", NON_FINITE) if skipped else "")
        for line, skipped in read_lines(run)
    }


def find_batch(run: str | Path, step: int) -> int:
    """The batch of step `step`, from 1; ValueError if the run has not taken that step."""
    history = read_history(run)
    for batch, (batch_step, skipped) in history.items():
        if batch_step == step and not skipped:
            return batch
    steps = [batch_step for batch_step, skipped in history.values() if not skipped]
    known = f"it has steps {min(steps)} to {max(steps)}" if steps else "it has none yet"
    raise ValueError(f"--step ({step}) is not among the steps of {run}; {known}.")
