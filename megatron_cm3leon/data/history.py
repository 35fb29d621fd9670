"""Which batch each step of a run took, from its metrics.jsonl.

A step that met a non-finite loss or gradient skips its batch: its line repeats the step before it. A later attempt goes
on from a checkpoint: its lines replace those of earlier attempts from its first batch on.
"""

import json
from pathlib import Path


def read_history(run: str | Path) -> dict[int, tuple[int, bool]]:
    """Batch -> (step, whether it was skipped), of the run as it stands; ValueError where there is no record."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is no run folder: it has no metrics.jsonl, which training writes.")
    steps: dict[int, int] = {}
    attempt = None
    for text in path.read_text().splitlines(keepends=True):
        if not text.endswith("\n"):  # a killed run can leave half a line
            continue
        line = json.loads(text)
        batch, step, own = line["batch"], line["step"], line["attempt"]
        if own != attempt:
            attempt, steps = own, {each: steps[each] for each in steps if each < batch}
        steps[batch] = step
    history, before = {}, 0
    for batch in sorted(steps):
        history[batch] = steps[batch], steps[batch] == before
        before = steps[batch]
    return history


def find_batch(run: str | Path, step: int) -> int:
    """The batch on which a run took step `step`, from 1; ValueError where it has not."""
    history = read_history(run)
    for batch, (own, skipped) in history.items():
        if own == step and not skipped:
            return batch
    steps = [own for own, skipped in history.values() if not skipped]
    known = f"it has steps {min(steps)} to {max(steps)}" if steps else "it has none yet"
    raise ValueError(f"--step ({step}) is not among the steps of {run}; {known}.")
