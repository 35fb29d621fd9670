"""Where a run's time went, from its folder alone: metrics.jsonl, and events.jsonl where there is one.

Wall time from the first record to the last is cut into

    kept         steps that are part of the run as it stands
    lost         steps that were taken again, rolled back or skipped
    start-up     of a process until its first step begins: weights are loaded, the data opened
    between      between steps: what saves and validation make training stand still, rollbacks, the last save
    down         from the last record of a process to the first of the next one: queue, imports, rendezvous

Goodput is the share of `kept`. A process ends with its last record, because nothing tells more of one that was killed.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.common.jsonl import parse_lines
from megatron_cm3leon.monitoring import events
from megatron_cm3leon.monitoring.history import METRICS, settle_lines

PARTS = ("kept", "lost", "start-up", "between", "down")


@dataclass
class Process:
    """One start of the run. Times are Unix seconds."""

    attempt: int
    start: float
    end: float
    lines: list[dict] = field(default_factory=list)
    """Its lines of metrics.jsonl."""
    events: list[dict] = field(default_factory=list)

    @property
    def trained(self) -> list[dict]:
        """Lines of steps that were taken, or tried: not those of batches that were left out."""
        return [line for line in self.lines if "step_seconds" in line]

    @property
    def start_up(self) -> float:
        """Seconds until the first step began."""
        if not self.trained:
            return self.end - self.start
        return max(0.0, self.trained[0]["time"] - self.trained[0]["step_seconds"] - self.start)


@dataclass
class Account:
    """A run's processes and lines, and its seconds by PARTS."""

    processes: list[Process]
    lines: list[tuple[dict, bool]]
    """As monitoring/history.py settles them: each batch's line, and whether the batch was skipped."""
    seconds: dict[str, float]

    @property
    def wall(self) -> float:
        return self.processes[-1].end - self.processes[0].start

    @property
    def goodput(self) -> float:
        """Share of wall time in steps that were kept; 0 before the first."""
        return self.seconds["kept"] / self.wall if self.wall else 0.0


def read_account(run: str | Path) -> Account:
    """The account of a run folder; ValueError where there is no record of a run."""
    run = Path(run)
    happened = events.read_events(run)
    lines = list(parse_lines(run / METRICS)) if (run / METRICS).is_file() else []
    if not happened and not lines:
        raise ValueError(
            f"{run} is no run folder: it has neither {METRICS} nor {events.NAME} with a line in it, which training "
            f"writes. Give the folder that output=... named."
        )
    processes, settled = find_processes(happened, lines), settle_lines(lines)
    kept = sum(line["step_seconds"] for line, skipped in settled if not skipped)
    trained = sum(line["step_seconds"] for process in processes for line in process.trained)
    start_up = sum(process.start_up for process in processes)
    alive = sum(process.end - process.start for process in processes)
    seconds = {
        "kept": kept,
        "lost": trained - kept,
        "start-up": start_up,
        "between": max(0.0, alive - start_up - trained),
        "down": max(0.0, processes[-1].end - processes[0].start - alive),  # old records have times of 10 s
    }
    return Account(processes, settled, seconds)


def find_processes(happened: list[dict], lines: list[dict]) -> list[Process]:
    """The starts of a run: at each `start` event; without events, where attempts or batches begin anew."""
    records = sorted([*happened, *lines], key=lambda record: record["time"])  # stable: lines keep their order
    processes: list[Process] = []
    for record in records:
        if record.get("event") == "requeue" and processes:
            continue  # recorded outside, between two processes
        begin = record["time"] - record.get("step_seconds", 0.0)
        if not processes or _is_new(record, processes[-1]):
            processes.append(Process(record["attempt"], begin, record["time"]))
        current = processes[-1]
        current.end = max(current.end, record["time"])
        (current.events if "event" in record else current.lines).append(record)
    return processes


def _is_new(record: dict, process: Process) -> bool:
    if record["attempt"] != process.attempt or record.get("event") == "start":
        return True
    # A run without events that was killed before its next checkpoint begins again under the same number.
    return bool(process.lines) and "step_seconds" in record and record["batch"] <= process.lines[-1]["batch"]
