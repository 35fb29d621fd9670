"""What a run did at each step, from its metrics.jsonl.

A step that met a non-finite loss or gradient skips its batch: its line repeats the step before it. So does the line of
a batch that was left out (after a spike, or because train.skip_batches asks for it); it replaces the line of the step
that was taken back. A later attempt goes on from a checkpoint: its lines replace those of earlier attempts from its
first batch on. Batch numbers count on when the batch size changes; positions.py finds a batch's sequences.
"""

from collections.abc import Iterable
from pathlib import Path

from megatron_cm3leon.common.jsonl import parse_lines

METRICS = "metrics.jsonl"
NON_FINITE = "non-finite"
REASONS = {
    NON_FINITE: "its loss or gradient was not finite",
    "spike": "the loss spiked, and the run went back to a checkpoint before it",
    "asked": "train.skip_batches leaves it out",
}
"""Why a batch was skipped, as its line's key `skipped` names it, and in words."""


def read_lines(run: str | Path) -> list[tuple[dict, bool]]:
    """Each batch's line and whether it was skipped, of the run as it stands; ValueError where there is no record."""
    path = Path(run) / METRICS
    if not path.is_file():
        raise ValueError(f"{run} is no run folder: it has no {METRICS}, which training writes.")
    return settle_lines(parse_lines(path))


def settle_lines(written: Iterable[dict]) -> list[tuple[dict, bool]]:
    """The lines that stand of those that were written, by batch, and whether each one's batch was skipped."""
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
    """The lines of a run's steps in order, skipped batches left out."""
    return [line for line, skipped in read_lines(run) if not skipped]


def read_history(run: str | Path) -> dict[int, tuple[int, str]]:
    """Batch -> (step, why it was skipped, one of REASONS; empty when it was not)."""
    return {
        line["batch"]: (line["step"], line.get("skipped", NON_FINITE) if skipped else "")
        for line, skipped in read_lines(run)
    }


def find_batch(run: str | Path, step: int) -> int:
    """The batch on which a run took step `step`, from 1; ValueError where it has not."""
    history = read_history(run)
    for batch, (own, skipped) in history.items():
        if own == step and not skipped:
            return batch
    steps = [own for own, skipped in history.values() if not skipped]
    known = f"it has steps {min(steps)} to {max(steps)}" if steps else "it has none yet"
    raise ValueError(f"--step ({step}) is not among the steps of {run}; {known}.")
