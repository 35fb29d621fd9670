"""Which rank a run waits for, from what the ranks said."""

from megatron_cm3leon.runtime.peers import Beat, Place
from megatron_cm3leon.runtime.stacks import Standing, dump_stacks, main_thread
from megatron_cm3leon.runtime.stall import find_late

PLACES = {rank: Place("n1", 100 + rank, "7", "pid") for rank in range(3)}
WAITING, BUSY = Standing("engine.py:1 train_step", True), Standing("loader.py:2 __next__", False)


def find(places=PLACES, silent=(), progress=(9, 9, 9), busy=()):
    before = {rank: Beat(5, progress[rank], f"step {progress[rank]}") for rank in range(3)}
    now = {rank: Beat(5 if rank in silent else 8, beat.progress, beat.phase) for rank, beat in before.items()}
    standings = {rank: BUSY if rank in busy else WAITING for rank in range(3) if rank not in silent}
    return find_late(3, places, before, now, standings)


def test_a_rank_that_never_came_goes_before_all():
    rank, text = find(places={0: PLACES[0], 1: PLACES[1]}, silent=(1,))
    assert rank == 2 and "rank 2 never came" in text


def test_a_silent_rank_is_named():
    rank, text = find(silent=(1,), progress=(9, 9, 8))
    assert rank == 1 and "rank 1 on host n1 (process 101) does not answer" in text


def test_the_rank_that_is_behind_is_named_with_its_place():
    rank, text = find(progress=(9, 9, 8), busy=(2,))
    assert rank == 2 and "late, in: step 8 (loader.py:2 __next__); the furthest is in: step 9" in text


def test_of_equals_the_one_that_is_in_no_collective_is_named():
    rank, text = find(busy=(0,))
    assert rank == 0 and "the others wait" in text


def test_without_a_difference_nobody_is_blamed():
    assert find()[0] == find(busy=(0, 1, 2))[0] == -1


def test_stacks_show_every_thread(tmp_path):
    dump_stacks(tmp_path / "new" / "rank.txt", "rank 0")
    text = (tmp_path / "new" / "rank.txt").read_text()
    assert text.startswith("rank 0\n") and "test_stacks_show_every_thread" in text
    assert not main_thread().in_collective
