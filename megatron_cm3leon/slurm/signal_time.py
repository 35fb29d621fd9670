"""How long before its time limit a job must be told to stop: the step under way, and the checkpoint, must fit."""

from pathlib import Path

from megatron_cm3leon.monitoring.events import read_events
from megatron_cm3leon.monitoring.history import read_lines

DEFAULT_SECONDS = 300
"""Where nothing was measured yet; the preset 7b on 8 GPUs writes 75 GiB, which takes 3 minutes at 0.5 GB/s."""
MARGIN_SECONDS = 30
RECENT_STEPS, RECENT_SAVES = 200, 20


def measure_lead(run: str | Path) -> float | None:
    """Seconds that a stop took at worst in this run folder; None where it has no steps or no saves yet.

    The slowest recent step with its wait for data, twice the slowest recent save (an asynchronous one may have just
    begun), and MARGIN_SECONDS.
    """
    if not (Path(run) / "metrics.jsonl").is_file():
        return None
    # A batch that was left out took no time, and has no such key.
    steps = [line["step_seconds"] for line, _ in read_lines(run) if "step_seconds" in line][-RECENT_STEPS:]
    saves = [event["seconds"] for event in read_events(run) if event["event"] == "saved"][-RECENT_SAVES:]
    if not steps or not saves:
        return None
    return max(steps) + 2 * max(saves) + MARGIN_SECONDS


def choose_lead(run: str | Path, given: int | None, limit: int) -> int:
    """Seconds of --signal: as given, else what was measured, else DEFAULT_SECONDS, at most a quarter of the limit.

    ValueError where the measured time, or the job's time limit (seconds), does not allow the one that was given.
    """
    measured = measure_lead(run)
    if given is None:
        if measured is None:
            return min(DEFAULT_SECONDS, max(1, limit // 4))
        given = max(round(measured + 0.5), 60)
    elif measured is not None and given < measured:
        raise ValueError(
            f"--lead ({given}) must be at least {measured:.0f} s: what a step and two saves of {run} took, and "
            f"{MARGIN_SECONDS} s; leave it out to use what was measured."
        )
    if given >= limit:
        raise ValueError(
            f"--time ({limit} s) must be longer than the {given} s in which the run saves before it ends; give more "
            f"time."
        )
    return given
