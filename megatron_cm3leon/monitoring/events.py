"""What happened to a run: events.jsonl in its folder, one JSON object a line, beside the metrics of its steps.

Every object has `time` (Unix seconds), `attempt`, `event` and, where there is one, `step` (optimizer steps taken):

| event | further keys |
|---|---|
| start | job, restarts (SLURM's, 0 elsewhere), ranks, hosts: a process group stands, before weights are loaded |
| initialize | weights, seed: a new model; weights is the version of drawing them (model/initialization.py) |
| resume | checkpoint: weights and optimizer are those of this checkpoint |
| saved | checkpoint, seconds, bytes: a checkpoint is complete under its final name |
| signal | signal, rank: asked to stop; the run saves and ends |
| skipped | batch, loss, grad_norm: no rank stepped |
| rollback | checkpoint, batches, loss: back to a checkpoint after a spike; these batches are left out |
| stall | seconds, rank, host, cause: no step for too long; stacks are in the run folder |
| failure | rank, host, cause, status: the first cause of an end that was not asked for; status 2 needs the user |
| stop | reason: finished, stop_after, signal |
| requeue | job, restarts, reason: SLURM starts the job again; step is that of the newest checkpoint |
| gave_up | job, restarts, reason: too many restarts in a row brought no new checkpoint |

An attempt without a `stop` ended without being asked to.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_cm3leon.common.jsonl import drop_half_line, parse_lines

NAME = "events.jsonl"


def record(run: str | Path, attempt: int, event: str, **values) -> None:
    """Append one event; several processes may record at once."""
    with _locked(run) as file:
        _append(file, attempt, event, values)


def record_first(run: str | Path, attempt: int, event: str, **values) -> bool:
    """Append the event unless this attempt has a failure or a stall already; whether it was appended.

    For ranks that can no longer reach each other: of those that find the same cause, one records and tells it.
    """
    with _locked(run) as file:
        known = [each["event"] for each in read_events(run) if each["attempt"] == attempt]
        if "failure" in known or "stall" in known:
            return False
        _append(file, attempt, event, values)
        return True


def next_attempt(run: str | Path) -> int:
    """The number of an attempt that begins now, from 1."""
    return 1 + max((each["attempt"] for each in read_events(run)), default=0)


@contextmanager
def _locked(run: str | Path) -> Iterator[int]:
    """The file, held against others who record; where there are no locks, two ranks may both be first."""
    file = os.open(Path(run) / NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _append(file: int, attempt: int, event: str, values: dict) -> None:
    line = json.dumps({"time": time.time(), "attempt": attempt, "event": event, **values}) + "\n"
    drop_half_line(file)
    os.write(file, line.encode())


def read_events(run: str | Path) -> list[dict]:
    """Every event in the order of recording, without what a kill cut off at the end; ValueError for a damaged line."""
    path = Path(run) / NAME
    if not path.is_file():
        return []
    return list(parse_lines(path))
