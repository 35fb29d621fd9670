"""Runs with two ranks that are stopped, killed, stalled or fail: how they end, what they print, and how they resume."""

import os
import signal
import time

import pytest

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.monitoring.history import read_lines
from megatron_cm3leon.runtime.signals import REPEAT_SECONDS
from tests.history import losses
from tests.runtime.world import World

STALL_SECONDS = 6
"""cluster.watchdog_seconds of the stalled runs, instead of 900."""


def resume_and_compare(folder, run, uninterrupted, launcher=""):
    """Start the run again, and compare it with the uninterrupted one."""
    world = World(folder, run, 2, launcher=launcher)
    assert not any(world.wait()), world.output()
    assert losses(folder / run) == uninterrupted
    assert [line["batch"] for line, _ in read_lines(folder / run)] == list(range(24))
    assert world.events("stop")[-1]["reason"] == "finished"
    attempts = [each["attempt"] for each in world.events("start")]
    assert attempts == list(range(1, len(attempts) + 1))


def test_a_signal_to_one_rank_stops_all_ranks_after_a_checkpoint(folder, uninterrupted):
    world = World(folder, "signal", 2, pace=0.1)
    world.wait_for_step(6)
    world.signal(signal.SIGUSR1, 1)
    assert world.wait() == [75, 75], world.output()
    found = world.events("signal")[0]
    stopped = world.events("stop")[0]
    assert (found["signal"], found["rank"], stopped["reason"]) == ("SIGUSR1", 1, "signal")
    assert stopped["step"] == found["step"] >= 6
    assert list_checkpoints(world.run)[-1].name == f"step-{stopped['step']:08d}"
    assert world.events("saved")[-1]["step"] == stopped["step"] and world.events("saved")[-1]["bytes"] > 300_000
    assert f"stopped at step {stopped['step']} after a signal" in world.output()
    resume_and_compare(folder, "signal", uninterrupted)
    resumed = world.events("resume")[0]
    assert (resumed["step"], resumed["checkpoint"]) == (stopped["step"], f"step-{stopped['step']:08d}")


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_the_run_immediately(folder):
    world = World(folder, "early", 2)
    world.wait_for(lambda: world.events("start"))
    world.signal(signal.SIGTERM, 1)
    assert world.wait() == [75, 75], world.output()
    assert world.output().count("SIGTERM before the first step") == 1 and "Traceback" not in world.output()
    assert [each["event"] for each in world.events()] == ["start", "signal", "stop"]


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_although_all_processes_receive_it(folder):
    world = World(folder, "interrupt", 2, "train.stop_after=20", launcher="torchrun", pace=0.1)
    world.wait_for_step(6)
    for process in world.list_processes():  # as a terminal does; torchrun also forwards the signal
        os.kill(process, signal.SIGINT)
    world.wait()
    [stopped] = world.events("stop")
    assert stopped["reason"] == "signal" and list_checkpoints(world.run)[-1].name == f"step-{stopped['step']:08d}"
    assert not world.events("failure")


def test_a_killed_rank_is_reported_and_the_others_end(folder):
    fault = {"rank": 1, "step": 10, "where": "step", "action": "kill"}
    world = World(folder, "killed", 2, faults=[fault])
    assert world.wait() == [1, -signal.SIGKILL], world.output()
    [failure] = world.events("failure")
    assert failure["rank"] == 1 and failure["status"] == 1
    process, printed = f"host {failure['host']} (process {world.processes[1].pid})", world.output()
    message = f"rank 1 on {process} ended without reporting a cause: killed, out of memory"
    assert printed.count(message) == 1 and "Traceback" not in printed and "peer" not in printed


def test_an_error_of_one_rank_is_printed_once_with_its_traceback(folder):
    fault = {"rank": 0, "step": 5, "where": "step", "action": "raise"}
    world = World(folder, "error", 2, launcher="torchrun", faults=[fault])
    assert world.wait() == [1], world.output()
    [failure] = world.events("failure")
    assert (failure["rank"], failure["cause"]) == (0, "KeyError: 'an error of the model'")
    assert world.output().count("in cause_fault") == 1 and "Connection closed by peer" not in world.output()


def test_a_sleeping_rank_is_reported_and_all_ranks_write_their_stacks(folder):
    world = World(
        folder,
        "sleeping",
        2,
        watchdog=STALL_SECONDS,
        faults=[{"rank": 1, "step": 5, "where": "loader", "action": "sleep"}],
    )
    assert world.wait() == [1, 1], world.output()
    [stall] = world.events("stall")
    assert stall["rank"] == 1 and "late, in: waiting for batch 5" in stall["cause"] and stall["cause"] in world.output()
    stacks = [path.read_text() for path in sorted((world.run / "stacks" / "attempt-1").iterdir())]
    assert len(stacks) == 2 and "train_step" in stacks[0] and "in cause_fault" in stacks[1]


@pytest.mark.slow
def test_a_rank_stopped_by_sigstop_is_reported_and_killed(folder):
    world = World(
        folder, "stopped", 2, watchdog=STALL_SECONDS, faults=[{"rank": 1, "step": 5, "where": "step", "action": "stop"}]
    )
    assert world.wait() == [1, -signal.SIGKILL], world.output()
    [stall] = world.events("stall")
    assert stall["rank"] == 1 and f"(process {world.processes[1].pid}) does not respond" in stall["cause"]


@pytest.mark.slow
def test_ranks_and_loaders_end_with_their_launcher(folder):
    world = World(folder, "orphans", 2, launcher="torchrun", pace=0.1)
    world.wait_for_step(3)
    world.signal(signal.SIGKILL, 0)
    assert world.wait(seconds=60) == [-signal.SIGKILL]
    assert world.output().count("the launcher (torchrun") == 1
    assert "launcher" in world.events("failure")[0]["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["validation", "save"])
def test_a_signal_during_validation_or_a_save_takes_effect_after_it(where, folder, uninterrupted):
    """A stop during validation happens after it; a stop during a save, one step after the save has started."""
    step = {"validation": 6, "save": 8}[where]
    fault = {"rank": 0, "step": step, "where": where, "action": "pause"}
    world = World(folder, f"during-{where}", 2, "validation.interval=6", pace=0.05, faults=[fault])
    world.wait_for((world.folder / "paused").exists)
    world.signal(signal.SIGTERM, 0)
    assert world.wait() == [75, 75], world.output()
    stopped = world.events("stop")[0]["step"]
    assert stopped == {"validation": 6, "save": 9}[where]
    assert list_checkpoints(world.run)[-1].name == f"step-{stopped:08d}"
    resume_and_compare(folder, f"during-{where}", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_with_both_engines_a_signal_saves_and_a_kill_ends_all_ranks(folder, engine, rank):
    overrides = ["train.engine=deepspeed", "parallel.zero=2"] if engine == "deepspeed" else ["parallel.tensor=2"]
    world = World(folder, f"{engine}-{rank}", 2, *overrides, pace=0.1)
    world.wait_for_step(6)
    world.signal(signal.SIGTERM, rank)
    assert world.wait() == [75, 75], world.output()
    world = World(folder, f"{engine}-{rank}", 2, *overrides, pace=0.1)
    world.wait_for_step(12)
    world.signal(signal.SIGKILL, rank)
    statuses = world.wait(seconds=60)
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1
    assert f"rank {rank} on host" in world.output() and "Traceback" not in world.output()


@pytest.mark.slow
def test_a_stopped_rank_that_hosts_the_store_is_reported(folder):
    world = World(
        folder, "host", 2, watchdog=STALL_SECONDS, faults=[{"rank": 0, "step": 5, "where": "step", "action": "stop"}]
    )
    assert world.wait() == [-signal.SIGKILL, 1], world.output()
    assert world.events("stall")[0]["rank"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("action, message", [("value", "shard is unreadable"), ("memory", "train.micro_batch_size")])
def test_an_error_that_the_user_must_fix_ends_all_ranks_with_status_2(folder, action, message):
    world = World(folder, action, 2, faults=[{"rank": 1, "step": 5, "where": "loader", "action": action}])
    assert world.wait() == [2, 2], world.output()
    assert world.output().count(message) == 1 and "Traceback" not in world.output()
    assert world.events("failure")[0]["status"] == 2


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_rejected_and_records_nothing(folder):
    first = World(folder, "shared", 1, pace=1.5)
    first.wait_for_step(1)
    second = World(folder, "shared", 2)
    assert second.wait() == [2, 2], second.output()
    assert second.output().count(f"is in use by process {first.processes[0].pid} on") == 1
    first.signal(signal.SIGTERM, 0)
    assert first.wait() == [75], first.output()
    assert {each["event"] for each in first.events()} == {"start", "initialize", "saved", "signal", "stop"}


@pytest.mark.slow
def test_a_second_signal_ends_the_run_immediately(folder):
    faults = [{"rank": rank, "step": 2, "where": "step", "action": "sleep"} for rank in (0, 1)]
    world = World(folder, "twice", 2, watchdog=0, faults=faults)
    world.wait_for(lambda: all((world.folder / f"sleeping-{rank}").exists() for rank in (0, 1)))
    world.signal(signal.SIGTERM, 0)
    time.sleep(REPEAT_SECONDS + 1)
    world.signal(signal.SIGTERM, 0)
    assert world.wait(seconds=60) == [1, 1], world.output()
    assert "a second SIGTERM: ended at once" in world.output()
