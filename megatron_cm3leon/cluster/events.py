"""What happened to a run: events.jsonl in its folder, one JSON object a line, beside the metrics of its steps.

Every object has `time` (Unix seconds), `attempt`, `event` and, where there is one, `step` (optimizer steps taken):

| event | further keys |
|---|---|
| start | job, restarts (SLURM's, 0 elsewhere), ranks, hosts: a process group stands, before weights are loaded |
| resume | checkpoint: weights and optimizer are those of this checkpoint |
| saved | checkpoint, seconds, bytes: a checkpoint is complete under its final name |
| signal | signal, rank: asked to stop; the run saves and ends |
| skipped | batch, loss, grad_norm: no rank stepped |
| rollback | checkpoint, batches, loss: back to a checkpoint after a spike; these batches are left out |
| stall | seconds, rank, host, cause: no step for too long; stacks are in the run folder |
| failure | rank, host, cause: the first cause of an end that was not asked for |
| stop | reason: finished, stop_after, signal |
| requeue | job, restarts, reason: SLURM starts the job again; step is that of the newest checkpoint |
| gave_up | job, restarts, reason: too many restarts in a row brought no new checkpoint |

An attempt without a `stop` ended without being asked to.
"""

import json
import os
import time
from pathlib import Path

NAME = "events.jsonl"


def record(run: str | Path, attempt: int, event: str, **values) -> None:
    """Append one event. A single write of a line: several processes may record at once."""
    line = json.dumps({"time": time.time(), "attempt": attempt, "event": event, **values}) + "\n"
    file = os.open(Path(run) / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read_events(run: str | Path) -> list[dict]:
    """Every event in the order of recording; a line that a full disk or a kill cut off is left out."""
    path = Path(run) / NAME
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
