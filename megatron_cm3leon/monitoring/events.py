"""Events of a run: events.jsonl in its folder, one JSON object per line.

Every object has `time` (Unix seconds), `attempt`, `event` and, where it applies, `step` (optimizer steps taken):

| event | further keys, and when it is recorded |
|---|---|
| start | job, restarts (SLURM's, 0 elsewhere), ranks, hosts: the process groups exist, no weights are loaded yet |
| initialize | weights, seed: a new run; `weights` is the version of the initial weights (model/initialization.py) |
| | init: the weights that it began with instead, with train.init (training/base_model.py) |
| resume | checkpoint: weights and optimizer state are loaded from it |
| saved | checkpoint, seconds, bytes: a checkpoint is complete under its final name |
| signal | signal, rank: a rank received a signal to stop; the run saves and ends |
| skipped | batch, loss, grad_norm: a batch with a non-finite loss or gradient; no rank took the step |
| rollback | checkpoint, batches, loss: rolled back to a checkpoint after a loss spike; these batches are skipped |
| stall | seconds, rank, host, cause: no progress for too long; stacks are in the run folder |
| failure | rank, host, cause, status: first cause of an unrequested end; with status 2 the user must fix something |
| stop | reason: finished, stop_after, signal |
| requeue | job, restarts, reason: SLURM starts the job again; `step` is that of the newest checkpoint |
| gave_up | job, restarts, reason: too many consecutive restarts without a new checkpoint |

An attempt without a `stop` ended because of a failure.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_cm3leon.common.jsonl import drop_truncated_line, parse_lines

NAME = "events.jsonl"


def record(run: str | Path, attempt: int, event: str, **values: object) -> None:
    """Append one event; several processes may do so at the same time. OSError if the file cannot be written."""
    with _locked(run) as file:
        _append(file, attempt, event, values)


def record_first(run: str | Path, attempt: int, event: str, **values: object) -> bool:
    """Append the event unless this attempt already has a failure or stall; returns whether it was appended.

    For ranks that can no longer reach each other: of those that find the same cause, one records and prints it.
    """
    with _locked(run) as file:
        recorded = [each["event"] for each in read_events(run) if each["attempt"] == attempt]
        if "failure" in recorded or "stall" in recorded:
            return False
        _append(file, attempt, event, values)
        return True


def next_attempt(run: str | Path) -> int:
    """The number of an attempt that starts now, from 1."""
    return 1 + max((each["attempt"] for each in read_events(run)), default=0)


@contextmanager
def _locked(run: str | Path) -> Iterator[int]:
    """Descriptor of the open file, locked; without file locks two ranks may both be first in record_first()."""
    file = os.open(Path(run) / NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _append(file: int, attempt: int, event: str, values: dict[str, object]) -> None:
    line = json.dumps({"time": time.time(), "attempt": attempt, "event": event, **values}) + "\n"
    drop_truncated_line(file)
    os.write(file, line.encode())


def read_events(run: str | Path) -> list[dict]:
    """All events in the order of recording, without a truncated last line; ValueError for a damaged line."""
    path = Path(run) / NAME
    if not path.is_file():
        return []
    return list(parse_lines(path))
