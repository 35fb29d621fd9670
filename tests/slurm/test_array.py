"""Task index and count from options and from job arrays."""

from itertools import pairwise

import pytest

from megatron_cm3leon.slurm.array import find_task


def test_a_task_is_found_from_arguments_or_from_a_job_array():
    assert find_task(None, None, {}) == (0, 1)
    assert find_task(2, 5, {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}) == (2, 5)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    assert find_task(None, None, array | {"SLURM_ARRAY_TASK_STEP": "3"}) == (2, 3)
    assert find_task(None, 1, array) == (0, 1)


def find_all_tasks(ids, **more):
    """(index, count) of each task of `sbatch --array` with these ids."""
    step = ids[1] - ids[0] if len(ids) > 1 else 1
    regular = all(after - before == step for before, after in pairwise(ids))
    array = {"COUNT": len(ids), "MIN": ids[0], "MAX": ids[-1], "STEP": step if regular and len(ids) > 2 else 1}
    array = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
    return [find_task(more.get("task"), more.get("tasks"), array | {"SLURM_ARRAY_TASK_ID": str(n)}) for n in ids]


@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 2, 3], [3, 4, 5], [0, 2, 4, 6], [3], [3, 6], [3, 4], [0, 63]])
def test_the_tasks_of_a_regular_array_share_all_the_work(ids):
    assert find_all_tasks(ids) == [(number, len(ids)) for number in range(len(ids))]


@pytest.mark.parametrize("ids", [[0, 3, 4], [3, 4, 6], [1, 2, 4, 7], [0, 1, 2, 63]])
def test_an_irregular_array_is_an_error_unless_the_number_of_tasks_is_given(ids):
    array = rf"{len(ids)} ids of this job array, {ids[0]} to {ids[-1]}, are not a regular range.*--num-tasks.*--task-id"
    with pytest.raises(ValueError, match=rf"SLURM_ARRAY_TASK_ID \({ids[0]}\): the {array}"):
        find_all_tasks(ids)
    assert find_all_tasks(ids, tasks=64) == [(number, 64) for number in ids]
    assert find_all_tasks(ids, task=5, tasks=8) == [(5, 8)] * len(ids)


def test_a_given_number_of_tasks_uses_the_ids_of_the_array():
    assert find_all_tasks([3, 6], tasks=8) == [(3, 8), (6, 8)]
    assert find_all_tasks([0, 1], tasks=1) == [(0, 1)] * 2
    with pytest.raises(ValueError, match=r"SLURM_ARRAY_TASK_ID \(8\) must be 0 to 7, below --num-tasks \(8\).*0-7"):
        find_all_tasks([8], tasks=8)
    with pytest.raises(ValueError, match="--task-id and --num-tasks must be given together"):
        find_task(None, 8, {})
    with pytest.raises(ValueError, match="--task-id and --num-tasks must be given together"):
        find_all_tasks([8], task=3)


def test_invalid_numbers_are_rejected_with_a_message():
    with pytest.raises(ValueError, match="--task-id and --num-tasks must be given together"):
        find_task(2, None, {})
    with pytest.raises(ValueError, match=r"--task-id \(5\) must be 0 to 4"):
        find_task(5, 5, {})
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_COUNT \\(''\\) must be a number"):
        find_task(None, None, {"SLURM_ARRAY_TASK_ID": "1"})
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID \\('abc'\\) must be a number"):
        find_task(None, None, {"SLURM_ARRAY_TASK_ID": "abc", "SLURM_ARRAY_TASK_COUNT": "2"})
