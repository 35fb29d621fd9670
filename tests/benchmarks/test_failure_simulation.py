"""The simulated run is compared with values computed by hand, with a step-by-step simulation and with theory."""

import random

import pytest

from benchmarks.failure_simulation import (
    Costs,
    best_interval,
    draw_failures,
    first_order,
    higher_order,
    mean_goodput,
    seconds_between_failures,
    simulate,
)

COSTS = Costs(step_seconds=2.0, save_seconds=1.0, restart_seconds=10.0)


def test_a_run_without_failures_takes_the_time_of_start_steps_and_saves():
    found = simulate([], 10, 4, COSTS)  # saves at 4, 8 and at the end
    assert (found.wall, found.kept, found.saving, found.starting, found.lost) == (10 + 20 + 3, 20, 3, 10, 0)
    assert found.goodput == 20 / 33 and simulate([33.5], 10, 4, COSTS).failures == 0


def test_a_failure_costs_a_restart_and_the_work_since_the_last_complete_checkpoint():
    found = simulate([24.0], 10, 4, COSTS)  # 14 s of work: 4 steps, a save, 2.5 steps
    assert (found.lost, found.failures) == (5, 1) and found.wall == 24 + 10 + 6 * 2 + 2
    late = Costs(step_seconds=2.0, save_seconds=1.0, restart_seconds=10.0, write_seconds=6.0)
    assert simulate([24.0], 10, 4, late).lost == 14  # the checkpoint was not complete yet
    while_starting = simulate([4.0, 9.0], 10, 4, COSTS)
    assert (while_starting.wall, while_starting.lost, while_starting.starting) == (9 + 10 + 23, 0, 19)


def simulate_every_step(failures, steps, interval, costs):
    """The same run, simulated step by step, for write_seconds of 0: wall seconds and lost seconds."""
    failures, now, saved, lost = iter(failures), 0.0, 0, 0.0
    failure = next(failures)
    while True:
        started, done, at_save = now + costs.restart_seconds, saved, now + costs.restart_seconds
        now = started
        while done < steps:
            now, done = now + costs.step_seconds, done + 1
            if done % interval == 0 or done == steps:
                now += costs.save_seconds
                if now <= failure:
                    saved, at_save = done, now
            if now > failure:
                break
        if now <= failure:
            return now, lost
        lost += max(0.0, failure - at_save)
        now, failure = failure, next(failures)


def test_simulate_equals_a_simulation_of_every_step():
    generator = random.Random(0)
    for seed in range(200):
        costs = Costs(step_seconds=generator.uniform(0.5, 3), save_seconds=generator.uniform(0, 4),
                      restart_seconds=generator.uniform(1, 30))  # fmt: skip
        steps, interval = generator.randrange(20, 200), generator.randrange(1, 40)
        between = generator.uniform(80, 400)
        found = simulate(draw_failures(between, seed), steps, interval, costs)
        wall, lost = simulate_every_step(draw_failures(between, seed), steps, interval, costs)
        assert (found.wall, found.lost) == (pytest.approx(wall), pytest.approx(lost)), (seed, steps, interval, costs)
        assert found.wall == pytest.approx(found.kept + found.lost + found.saving + found.starting)


def test_the_best_interval_agrees_with_daly_where_its_assumptions_hold():
    costs = Costs(step_seconds=1.0, save_seconds=5.0, restart_seconds=60.0)
    between = seconds_between_failures(64, 0.3)
    assert between == 4500
    assert first_order(5.0, between) == pytest.approx(212.1, abs=0.1)
    assert higher_order(5.0, between) == pytest.approx(208.8, abs=0.1)
    interval, goodput = best_interval(between, 200_000, costs, seeds=8)
    assert 150 < interval < 300  # the optimum is flat
    daly = mean_goodput(between, 200_000, round(higher_order(5.0, between)), costs, seeds=8)
    assert goodput >= daly > goodput - 0.003
    assert daly > mean_goodput(between, 200_000, 2000, costs, seeds=8) + 0.05
    assert higher_order(10.0, 4.0) == 4.0
