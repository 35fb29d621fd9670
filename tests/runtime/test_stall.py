"""Which rank a stalled run waits for, found from the heartbeats and stack positions of the ranks."""

from megatron_cm3leon.runtime.peers import Heartbeat, ProcessId
from megatron_cm3leon.runtime.stacks import StackPosition, dump_stacks, find_main_thread
from megatron_cm3leon.runtime.stall import find_late

PROCESSES = {rank: ProcessId("n1", 100 + rank, "7", "pid") for rank in range(3)}
WAITING, BUSY = StackPosition("engine.py:1 train_step", True), StackPosition("loader.py:2 __next__", False)


def find(processes=PROCESSES, silent=(), progress=(9, 9, 9), busy=()):
    before = {rank: Heartbeat(5, progress[rank], f"step {progress[rank]}") for rank in range(3)}
    now = {rank: Heartbeat(5 if rank in silent else 8, beat.progress, beat.phase) for rank, beat in before.items()}
    positions = {rank: BUSY if rank in busy else WAITING for rank in range(3) if rank not in silent}
    return find_late(3, processes, before, now, positions)


def test_a_rank_that_never_connected_is_reported_first():
    rank, text = find(processes={0: PROCESSES[0], 1: PROCESSES[1]}, silent=(1,))
    assert rank == 2 and "rank 2 never connected" in text


def test_a_silent_rank_is_reported():
    rank, text = find(silent=(1,), progress=(9, 9, 8))
    assert rank == 1 and "rank 1 on host n1 (process 101) does not respond" in text


def test_the_rank_in_an_earlier_phase_is_reported_with_its_position():
    rank, text = find(progress=(9, 9, 8), busy=(2,))
    assert rank == 2 and "late, in: step 8 (loader.py:2 __next__); the furthest is in: step 9" in text


def test_in_the_same_phase_the_rank_outside_a_collective_is_reported():
    rank, text = find(busy=(0,))
    assert rank == 0 and "the others wait" in text


def test_without_a_difference_no_rank_is_reported():
    assert find()[0] == find(busy=(0, 1, 2))[0] == -1


def test_stacks_show_every_thread(tmp_path):
    dump_stacks(tmp_path / "new" / "rank.txt", "rank 0")
    text = (tmp_path / "new" / "rank.txt").read_text()
    assert text.startswith("rank 0\n") and "test_stacks_show_every_thread" in text
    assert not find_main_thread().in_collective
