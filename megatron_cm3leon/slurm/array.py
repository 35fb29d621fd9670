"""Task index and count of a SLURM job array, or of the options --task-id and --num-tasks.

The tasks of an array divide the whole work among themselves; parts that an earlier array finished are kept. An array
of any regular range (0-7, 1-8, 3-5, 0-14:2) therefore completes everything that is missing. In an irregular array, such
as 0,3,4, a task cannot find its index: SLURM provides only the smallest and largest id and the number of tasks.
"""

import logging
import os
from collections.abc import Mapping

logger = logging.getLogger(__name__)


def find_task(task: int | None, tasks: int | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(index, count) of this task: `--task-id` and `--num-tasks`, else of the SLURM job array, else (0, 1).

    With `--num-tasks` alone the array's ids are the indices, so that any of them can be run again. ValueError if the
    index is out of range, if only one of the two options is given outside an array, or if the array is irregular.
    """
    in_array = "SLURM_ARRAY_TASK_ID" in environment
    if tasks is None and task is None:
        return _find_in_array(environment) if in_array else (0, 1)
    if tasks is None or (task is None and tasks > 1 and not in_array):
        raise ValueError("--task-id and --num-tasks must be given together.")
    if tasks < 1:
        raise ValueError(f"--num-tasks ({tasks}) must be at least 1.")
    name, remedy = "--task-id", ""
    if task is None and tasks > 1:
        name, task = "SLURM_ARRAY_TASK_ID", _read_variable(environment, "ID")
        remedy = f" Number the array from 0 (--array=0-{tasks - 1}), or add --task-id."
    task = task or 0
    if not 0 <= task < tasks:
        raise ValueError(f"{name} ({task}) must be 0 to {tasks - 1}, below --num-tasks ({tasks}).{remedy}")
    return task, tasks


def _find_in_array(environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, count) of this task in a job array; ValueError for an irregular array."""
    number, count = _read_variable(environment, "ID"), _read_variable(environment, "COUNT")
    first, step = _read_variable(environment, "MIN", "0"), _read_variable(environment, "STEP", "1")
    last = _read_variable(environment, "MAX", str(first + step * (count - 1)))
    if count == 2:
        step = last - first  # two ids are always regular
    index = (number - first) / step if step > 0 else 0
    if first + step * (count - 1) != last or index not in range(count):
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID ({number}): the {count} ids of this job array, {first} to {last}, are not a regular "
            f"range, so a task cannot find its index. To repeat tasks of an earlier array, add its size: --num-tasks 8 "
            f"after --array=0-7; add --task-id if its ids did not start at 0."
        )
    logger.info("job array: this is task %d of %d (SLURM_ARRAY_TASK_ID %d)", index, count, number)
    return int(index), count


def _read_variable(environment: Mapping[str, str], name: str, default: str = "") -> int:
    """SLURM_ARRAY_TASK_<name> as a number; ValueError if it is not one."""
    variable = f"SLURM_ARRAY_TASK_{name}"
    value = environment.get(variable, default)
    if not value.isdecimal():
        raise ValueError(
            f"{variable} ({value!r}) must be a number when SLURM_ARRAY_TASK_ID is set; add --task-id and "
            f"--num-tasks, or unset SLURM_ARRAY_TASK_ID."
        )
    return int(value)
