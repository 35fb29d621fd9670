"""What a run did at each step, from its metrics.jsonl.

A step that met a non-finite loss or gradient skips its batch: its line repeats the step before it. A later attempt goes
on from a checkpoint: its lines replace those of earlier attempts from its first batch on.
"""

import json
from pathlib import Path


def read_lines(run: str | Path) -> list[tuple[dict, bool]]:
    """Each batch's line and whether it was skipped, of the run as it stands; ValueError where there is no record."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is no run folder: it has no metrics.jsonl, which training writes.")
    lines: dict[int, dict] = {}
    attempt = None
    for text in path.read_text().splitlines(keepends=True):
        if not text.endswith("\n"):  # a killed run can leave half a line
            continue
        line = json.loads(text)
        if line["attempt"] != attempt:
            attempt, lines = line["attempt"], {each: lines[each] for each in lines if each < line["batch"]}
        lines[line["batch"]] = line
    ordered = [lines[batch] for batch in sorted(lines)]
    before = [0, *(line["step"] for line in ordered)]
    return [(line, line["step"] == step) for line, step in zip(ordered, before, strict=False)]


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run's steps in order, skipped batches left out."""
    return [line for line, skipped in read_lines(run) if not skipped]


def read_history(run: str | Path) -> dict[int, tuple[int, bool]]:
    """Batch -> (step, whether it was skipped)."""
    return {line["batch"]: (line["step"], skipped) for line, skipped in read_lines(run)}


def find_batch(run: str | Path, step: int) -> int:
    """The batch on which a run took step `step`, from 1; ValueError where it has not."""
    history = read_history(run)
    for batch, (own, skipped) in history.items():
        if own == step and not skipped:
            return batch
    steps = [own for own, skipped in history.values() if not skipped]
    known = f"it has steps {min(steps)} to {max(steps)}" if steps else "it has none yet"
    raise ValueError(f"--step ({step}) is not among the steps of {run}; {known}.")
