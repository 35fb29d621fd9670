"""Where the wall time of a run went, from its folder: metrics.jsonl, and events.jsonl if there is one.

Wall time from the first record to the last is divided into

    kept         steps that are part of the run's final history
    lost         steps that were repeated, rolled back or skipped
    start-up     from the start of a process to its first step: loading weights, opening data
    between      between steps: time in which saves and validation block training, rollbacks, the last save
    down         from the last record of a process to the first of the next one: queue, imports, rendezvous

Goodput is the share of `kept`. A process is assumed to end with its last record, since a killed one leaves no other.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.common.jsonl import parse_lines
from megatron_cm3leon.monitoring import events
from megatron_cm3leon.monitoring.history import METRICS, select_latest

PARTS = ("kept", "lost", "start-up", "between", "down")


@dataclass
class Process:
    """One start of a run. Times are Unix seconds."""

    attempt: int
    start: float
    end: float
    lines: list[dict] = field(default_factory=list)
    """Its lines of metrics.jsonl."""
    events: list[dict] = field(default_factory=list)

    @property
    def trained(self) -> list[dict]:
        """Lines of batches on which the run trained, without those that it skipped before training."""
        return [line for line in self.lines if "step_seconds" in line]

    @property
    def start_up(self) -> float:
        """Seconds from the start to the first step."""
        if not self.trained:
            return self.end - self.start
        return max(0.0, self.trained[0]["time"] - self.trained[0]["step_seconds"] - self.start)


@dataclass
class TimeBreakdown:
    """The processes and lines of a run, and its wall time by PARTS."""

    processes: list[Process]
    lines: list[tuple[dict, bool]]
    """Latest line of each batch, and whether the batch was skipped (history.select_latest)."""
    seconds: dict[str, float]
    """Part -> seconds."""

    @property
    def wall(self) -> float:
        """Seconds from the first record to the last."""
        return self.processes[-1].end - self.processes[0].start

    @property
    def goodput(self) -> float:
        """Share of wall time in kept steps, 0 to 1; 0 before the first step."""
        return self.seconds["kept"] / self.wall if self.wall else 0.0


def read_time_breakdown(run: str | Path) -> TimeBreakdown:
    """The time breakdown of a run folder; ValueError for a folder without records of a run."""
    run = Path(run)
    recorded = events.read_events(run)
    lines = list(parse_lines(run / METRICS)) if (run / METRICS).is_file() else []
    if not recorded and not lines:
        raise ValueError(
            f"{run} is not a run folder: it has neither {METRICS} nor {events.NAME} with a line in it, which training "
            f"writes; give the folder of output=..."
        )
    processes, latest = find_processes(recorded, lines), select_latest(lines)
    kept = sum(line["step_seconds"] for line, skipped in latest if not skipped)
    trained = sum(line["step_seconds"] for process in processes for line in process.trained)
    start_up = sum(process.start_up for process in processes)
    alive = sum(process.end - process.start for process in processes)
    seconds = {
        "kept": kept,
        "lost": trained - kept,
        "start-up": start_up,
        "between": max(0.0, alive - start_up - trained),
        # Records of old versions have a resolution of 10 s, so that this may be negative.
        "down": max(0.0, processes[-1].end - processes[0].start - alive),
    }
    return TimeBreakdown(processes, latest, seconds)


def find_processes(recorded: list[dict], lines: list[dict]) -> list[Process]:
    """The processes of a run, divided at `start` events; without events, where the attempt changes or batches restart.

    `recorded`: the events; `lines`: those of metrics.jsonl.
    """
    records = sorted([*recorded, *lines], key=lambda record: record["time"])  # stable: equal times keep their order
    processes: list[Process] = []
    for record in records:
        if record.get("event") == "requeue" and processes:
            continue  # recorded by the batch script, between two processes
        begin = record["time"] - record.get("step_seconds", 0.0)
        if not processes or _is_new(record, processes[-1]):
            processes.append(Process(record["attempt"], begin, record["time"]))
        current = processes[-1]
        current.end = max(current.end, record["time"])
        (current.events if "event" in record else current.lines).append(record)
    return processes


def _is_new(record: dict, process: Process) -> bool:
    """Whether `record` is the first of the next process."""
    if record["attempt"] != process.attempt or record.get("event") == "start":
        return True
    # Without events, a run that was killed before its next checkpoint restarts with the same attempt number.
    return bool(process.lines) and "step_seconds" in record and record["batch"] <= process.lines[-1]["batch"]
