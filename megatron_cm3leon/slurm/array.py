"""Which share of the work is this process's: one of several tasks, such as those of a SLURM job array.

The tasks of an array share the whole work among themselves: parts that an earlier array finished are kept. So an array
of any regular range (0-7, 1-8, 3-5, 0-14:2) does everything that is missing. Of an irregular one, such as 0,3,4, a
task does not know its place: SLURM gives it only the smallest and the largest id and their number.
"""

import logging
import os
from collections.abc import Mapping

logger = logging.getLogger(__name__)


def find_task(task: int | None, tasks: int | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(task, tasks): `--task-id` and `--num-tasks` as given, else of the SLURM job array, else the only one.

    With `--num-tasks` alone the array's ids are the tasks, so that any of them can be run again. ValueError where the
    task is none of them, where only one of the two is given outside an array, or where the array is irregular.
    """
    in_array = "SLURM_ARRAY_TASK_ID" in environment
    if tasks is None and task is None:
        return _find_in_array(environment) if in_array else (0, 1)
    if tasks is None or (task is None and tasks > 1 and not in_array):
        raise ValueError("give --task-id and --num-tasks together.")
    if tasks < 1:
        raise ValueError(f"--num-tasks ({tasks}) must be at least 1.")
    name, remedy = "--task-id", ""
    if task is None and tasks > 1:
        name, task = "SLURM_ARRAY_TASK_ID", _read(environment, "ID")
        remedy = f" Number the array from 0 (--array=0-{tasks - 1}), or give --task-id too."
    task = task or 0
    if not 0 <= task < tasks:
        raise ValueError(f"{name} ({task}) must be 0 to {tasks - 1}, below --num-tasks ({tasks}).{remedy}")
    return task, tasks


def _find_in_array(environment: Mapping[str, str]) -> tuple[int, int]:
    number, count = _read(environment, "ID"), _read(environment, "COUNT")
    first, step = _read(environment, "MIN", "0"), _read(environment, "STEP", "1")
    last = _read(environment, "MAX", str(first + step * (count - 1)))
    if count == 2:
        step = last - first  # whatever lies between them
    place = (number - first) / step if step > 0 else 0
    if first + step * (count - 1) != last or place not in range(count):
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID ({number}): the {count} ids of this job array, {first} to {last}, are not a regular "
            f"range, so a task cannot know its share. To run tasks of an earlier array again give its size: "
            f"--num-tasks 8 after --array=0-7; also --task-id where its ids did not count from 0."
        )
    logger.info("job array: this is task %d of %d (SLURM_ARRAY_TASK_ID %d)", place, count, number)
    return int(place), count


def _read(environment: Mapping[str, str], name: str, default: str = "") -> int:
    variable = f"SLURM_ARRAY_TASK_{name}"
    value = environment.get(variable, default)
    if not value.isdecimal():
        raise ValueError(
            f"{variable} ({value!r}) must be a number where SLURM_ARRAY_TASK_ID is set; give --task-id and "
            f"--num-tasks, or unset SLURM_ARRAY_TASK_ID."
        )
    return int(value)
