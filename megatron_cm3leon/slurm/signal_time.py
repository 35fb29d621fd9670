"""How long before its time limit a job gets the signal to stop: the current step and a checkpoint must fit in."""

from pathlib import Path

from megatron_cm3leon.monitoring.events import read_events
from megatron_cm3leon.monitoring.history import read_lines

DEFAULT_SECONDS = 300
"""Without measurements; the preset 7b on 8 GPUs writes 75 GiB, which takes 3 minutes at 0.5 GB/s."""
MARGIN_SECONDS = 30
RECENT_STEPS, RECENT_SAVES = 200, 20
"""Number of last steps and saves that are considered."""


def measure_signal_time(run: str | Path) -> float | None:
    """Longest time in seconds that a stop needs by the records of a run folder; None without steps or saves.

    It is the slowest recent step including its wait for data, plus twice the slowest recent save (an asynchronous one
    may have just started), plus MARGIN_SECONDS.
    """
    if not (Path(run) / "metrics.jsonl").is_file():
        return None
    # The line of a batch that was skipped before training has no step_seconds.
    steps = [line["step_seconds"] for line, _ in read_lines(run) if "step_seconds" in line][-RECENT_STEPS:]
    saves = [event["seconds"] for event in read_events(run) if event["event"] == "saved"][-RECENT_SAVES:]
    if not steps or not saves:
        return None
    return max(steps) + 2 * max(saves) + MARGIN_SECONDS


def choose_signal_time(run: str | Path, given: int | None, limit: int) -> int:
    """Seconds of sbatch's --signal: `given`, else the measured time, else DEFAULT_SECONDS or a quarter of `limit`.

    `limit`: the job's time limit in seconds. ValueError if `given` is below the measured time or not below `limit`.
    """
    measured = measure_signal_time(run)
    if given is None:
        if measured is None:
            return min(DEFAULT_SECONDS, max(1, limit // 4))
        given = max(round(measured + 0.5), 60)
    elif measured is not None and given < measured:
        raise ValueError(
            f"--signal-time ({given}) must be at least {measured:.0f} s: a step and two saves of {run}, plus "
            f"{MARGIN_SECONDS} s; omit it to use the measured time."
        )
    if given >= limit:
        raise ValueError(
            f"--time ({limit} s) must be longer than the {given} s that the run needs to save before it ends; raise it."
        )
    return given
