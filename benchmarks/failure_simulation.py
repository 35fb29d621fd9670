"""Simulation of a run with failures: its goodput for given failures, and the best checkpoint interval.

The model: a process needs restart_seconds from a failure until its first step begins (detection, queue, start-up,
loading); a failure during this time starts it again. Then the process trains; after every `interval` steps training
stalls for save_seconds, and write_seconds later the checkpoint is complete (0 for a synchronous save). A failure rolls
the run back to its last complete checkpoint. first_order() and higher_order() are the known approximations of the best
interval:

    Young 1974     sqrt(2 x save_seconds x time between failures)
    Daly 2006      its equation 37, of higher order: doi.org/10.1016/j.future.2004.11.016
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from megatron_cm3leon.monitoring.goodput import TimeBreakdown

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of a run, seconds."""

    step_seconds: float
    save_seconds: float
    """Stall of training per save."""
    restart_seconds: float
    """From a failure until the first step begins."""
    write_seconds: float = 0.0
    """From the end of the stall until the checkpoint is complete."""
    start_seconds: float | None = None
    """Until the first step of the first process; None: restart_seconds."""


@dataclass(frozen=True)
class Outcome:
    """Seconds of a completed simulated run."""

    wall: float
    kept: float
    """In steps that were kept."""
    lost: float
    """In steps that had to be repeated, and in saves that were never complete."""
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
    """Simulate a run of `steps` steps with a checkpoint every `interval` steps and at the end.

    failures: times of failures in seconds since the start of the run, ascending; those after its end are ignored.
    restarts: seconds of the first restarts, if known; later restarts take costs.restart_seconds.
    """
    known = iter(restarts)
    cycle = max(interval * costs.step_seconds + costs.save_seconds, costs.write_seconds)
    now, saved, n_failures = 0.0, 0, 0
    lost = saving = 0.0
    starting = wait = costs.restart_seconds if costs.start_seconds is None else costs.start_seconds
    for failure in failures:
        left = steps - saved
        end = now + wait + _seconds_to_end(left, interval, cycle, costs)
        if failure >= end:
            break
        n_failures += 1
        worked = failure - now - wait
        if worked < 0:  # a failure during the start
            starting += worked
        else:
            n_saves = min(max(0, math.floor((worked - costs.write_seconds) / cycle)), (left - 1) // interval)
            saved += n_saves * interval
            saving += n_saves * (cycle - interval * costs.step_seconds)
            lost += worked - n_saves * cycle
        now, wait = failure, next(known, costs.restart_seconds)
        starting += wait
    left = steps - saved
    wall = now + wait + _seconds_to_end(left, interval, cycle, costs)
    saving += _seconds_to_end(left, interval, cycle, costs) - left * costs.step_seconds
    return Outcome(wall, steps * costs.step_seconds, lost, saving, starting, n_failures)


def _seconds_to_end(left: int, interval: int, cycle: float, costs: Costs) -> float:
    """From the first step of a process that has `left` steps to do until its last save is complete."""
    saves = (left - 1) // interval
    return saves * cycle + (left - saves * interval) * costs.step_seconds + costs.save_seconds + costs.write_seconds


def draw_failures(between: float, seed: int) -> Iterable[float]:
    """Times of independent failures, `between` seconds apart on average; an infinite iterator."""
    generator, moment = random.Random(seed), 0.0
    while True:
        moment += generator.expovariate(1 / between)
        yield moment


def seconds_between_failures(nodes: int, failures_per_node_day: float) -> float:
    """Mean seconds between failures of a run that any node's failure ends."""
    return SECONDS_PER_DAY / (nodes * failures_per_node_day)


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
    """Mean over `seeds` simulated runs, whose failures are the same for every interval."""
    return fmean(simulate(draw_failures(between, seed), steps, interval, costs).goodput for seed in range(seeds))


def best_interval(between: float, steps: int, costs: Costs, seeds: int) -> tuple[int, float]:
    """The interval in steps with the highest mean goodput, and that goodput.

    Tries Young's and Daly's intervals, and intervals 5 % apart from an eighth of Young's to eight times it, limited to
    1 to `steps`.
    """
    stall = max(costs.save_seconds, 1e-3 * costs.step_seconds)
    young, daly = (rule(stall, between) / costs.step_seconds for rule in (first_order, higher_order))
    candidates = [daly, *(young * 1.05**power for power in range(-43, 44))]
    tried = {min(steps, max(1, round(interval))) for interval in candidates}
    return max(
        ((interval, mean_goodput(between, steps, interval, costs, seeds)) for interval in sorted(tried)),
        key=lambda pair: pair[1],
    )


def replay(times: TimeBreakdown, steps: int, interval: int) -> Outcome:
    """Simulate a finished run with its own failures, restarts and mean costs, to compare with its measured goodput.

    Every process but the last is assumed to have failed at the time of its last record. The extra time of a process's
    first step counts as its start; time between steps counts as stalls of saves.
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
