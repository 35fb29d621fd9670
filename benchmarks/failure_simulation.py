"""A run that fails now and then, in arithmetic: its goodput for given failures, and the checkpoint interval to choose.

The model: a process needs restart_seconds from a failure until its first step begins (detection, queue, start-up,
loading); a failure within them begins them again. Then it takes steps; after every `interval` of them training stands
still for save_seconds, and write_seconds later the checkpoint is whole (0 for a synchronous save). A failure takes the
run back to its last whole checkpoint. With first_order() and higher_order(), the known approximations:

    Young 1974     sqrt(2 x save_seconds x time between failures)
    Daly 2006      its equation 37, of higher order: doi.org/10.1016/j.future.2004.11.016
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from megatron_cm3leon.monitoring.goodput import TimeBreakdown

SECONDS_A_DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run pays, seconds."""

    step_seconds: float
    save_seconds: float
    """Training stands still for a save."""
    restart_seconds: float
    """From a failure until the first step begins."""
    write_seconds: float = 0.0
    """From the end of the stall until the checkpoint is whole."""
    start_seconds: float | None = None
    """Until the first step of the first process; None: as restart_seconds."""


@dataclass(frozen=True)
class Outcome:
    """Seconds of a simulated run that came to its end."""

    wall: float
    kept: float
    """In steps that are part of the run."""
    lost: float
    """In steps that were taken again, and in saves that were never whole."""
    saving: float
    starting: float
    failures: int
    """Failures before the end."""

    @property
    def goodput(self) -> float:
        return self.kept / self.wall


def simulate(
    failures: Iterable[float], steps: int, interval: int, costs: Costs, restarts: Iterable[float] = ()
) -> Outcome:
    """Run `steps` steps with a checkpoint every `interval` of them, and at the end.

    failures: ascending, in seconds since the start of the run; those beyond its end are not met. restarts: seconds of
    the first restarts, where they are known; costs.restart_seconds after those.
    """
    known = iter(restarts)
    cycle = max(interval * costs.step_seconds + costs.save_seconds, costs.write_seconds)
    now, saved, met = 0.0, 0, 0
    lost = saving = 0.0
    starting = wait = costs.restart_seconds if costs.start_seconds is None else costs.start_seconds
    for failure in failures:
        left = steps - saved
        end = now + wait + _seconds_to_end(left, interval, cycle, costs)
        if failure >= end:
            break
        met += 1
        worked = failure - now - wait
        if worked < 0:  # while it started
            starting += worked
        else:
            whole = min(max(0, math.floor((worked - costs.write_seconds) / cycle)), (left - 1) // interval)
            saved += whole * interval
            saving += whole * (cycle - interval * costs.step_seconds)
            lost += worked - whole * cycle
        now, wait = failure, next(known, costs.restart_seconds)
        starting += wait
    left = steps - saved
    wall = now + wait + _seconds_to_end(left, interval, cycle, costs)
    saving += _seconds_to_end(left, interval, cycle, costs) - left * costs.step_seconds
    return Outcome(wall, steps * costs.step_seconds, lost, saving, starting, met)


def _seconds_to_end(left: int, interval: int, cycle: float, costs: Costs) -> float:
    """From the first step of a process that takes `left` of them, from a checkpoint, until the last save is whole."""
    saves = (left - 1) // interval
    return saves * cycle + (left - saves * interval) * costs.step_seconds + costs.save_seconds + costs.write_seconds


def draw_failures(between: float, seed: int) -> Iterable[float]:
    """Moments of failures that are independent of each other, `between` seconds apart on average, without end."""
    generator, moment = random.Random(seed), 0.0
    while True:
        moment += generator.expovariate(1 / between)
        yield moment


def seconds_between_failures(nodes: int, failures_per_node_day: float) -> float:
    """Of a run that any node's failure ends."""
    return SECONDS_A_DAY / (nodes * failures_per_node_day)


def first_order(save_seconds: float, between: float) -> float:
    """Young's interval, seconds of work between checkpoints."""
    return math.sqrt(2 * save_seconds * between)


def higher_order(save_seconds: float, between: float) -> float:
    """Daly's interval, seconds of work between checkpoints."""
    if save_seconds >= 2 * between:
        return between
    share = save_seconds / (2 * between)
    return math.sqrt(2 * save_seconds * between) * (1 + math.sqrt(share) / 3 + share / 9) - save_seconds


def mean_goodput(between: float, steps: int, interval: int, costs: Costs, seeds: int) -> float:
    """Mean over `seeds` simulated runs; the same failures for any interval."""
    return fmean(simulate(draw_failures(between, seed), steps, interval, costs).goodput for seed in range(seeds))


def best_interval(between: float, steps: int, costs: Costs, seeds: int) -> tuple[int, float]:
    """The interval in steps with the highest mean goodput, and that goodput; intervals are 5 % apart.

    Searched from an eighth of Young's interval to eight times it, within 1 and `steps`; Young's and Daly's are tried.
    """
    stall = max(costs.save_seconds, 1e-3 * costs.step_seconds)
    young, daly = (rule(stall, between) / costs.step_seconds for rule in (first_order, higher_order))
    wanted = [daly, *(young * 1.05**power for power in range(-43, 44))]
    tried = {min(steps, max(1, round(interval))) for interval in wanted}
    return max(
        ((interval, mean_goodput(between, steps, interval, costs, seeds)) for interval in sorted(tried)),
        key=lambda pair: pair[1],
    )


def replay(times: TimeBreakdown, steps: int, interval: int) -> Outcome:
    """Simulate a finished run with its own failures, restarts and mean costs, to compare with its measured goodput.

    Every process but the last is taken to have ended in a failure with its last record. What the first step of a
    process takes longer than the others counts as its start; what lies between steps counts as stalls of saves.
    """
    processes = times.processes
    later = [line["step_seconds"] for process in processes for line in process.trained[1:]]
    step_seconds, waits, previous = fmean(later), [], processes[0].start
    for process in processes:
        first = process.trained[0]["step_seconds"] if process.trained else step_seconds
        waits.append(process.start - previous + process.start_up + first - step_seconds)
        previous = process.end
    events = [event for process in processes for event in process.events if event["event"] == "saved"]
    stall = times.seconds["between"] / max(1, len(later) / interval)
    costs = Costs(
        step_seconds=step_seconds,
        save_seconds=stall,
        restart_seconds=fmean(waits),
        write_seconds=max(0.0, fmean(event["seconds"] for event in events) - stall) if events else 0.0,
        start_seconds=waits[0],
    )
    ends = [process.end - processes[0].start for process in processes[:-1]]
    return simulate(ends, steps, interval, costs, waits[1:])
