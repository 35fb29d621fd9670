"""Which share of the work is a task's."""

import pytest

from megatron_cm3leon.tasks import find_task


def test_from_arguments_and_from_a_job_array():
    assert find_task(None, None, {}) == (0, 1)
    assert find_task(2, 5, {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}) == (2, 5)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    assert find_task(None, None, array | {"SLURM_ARRAY_TASK_STEP": "3"}) == (2, 3)
    assert find_task(None, 1, array) == (0, 1)


def test_messages():
    with pytest.raises(ValueError, match="--task-id and --num-tasks together"):
        find_task(2, None, {})
    with pytest.raises(ValueError, match=r"--task-id \(5\) must be 0 to 4"):
        find_task(5, 5, {})
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_COUNT \\(''\\) must be a number"):
        find_task(None, None, {"SLURM_ARRAY_TASK_ID": "1"})
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID \\('abc'\\) must be a number"):
        find_task(None, None, {"SLURM_ARRAY_TASK_ID": "abc", "SLURM_ARRAY_TASK_COUNT": "2"})
