"""Which share of the work is this process's: one of several tasks, such as those of a SLURM job array."""

import os
from collections.abc import Mapping


def find_task(task: int | None, tasks: int | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(task, tasks): `--task-id` and `--num-tasks` as given, else of the SLURM job array, else the only one.

    ValueError where one is given without the other, or the task is none of them.
    """
    if (task is None) != (tasks is None) and (tasks is None or tasks > 1):
        raise ValueError("give --task-id and --num-tasks together.")
    if tasks is None and "SLURM_ARRAY_TASK_ID" in environment:
        # An array may begin at 1, and go up in steps.
        first, step = (_read(environment, name, default) for name, default in (("MIN", "0"), ("STEP", "1")))
        return (_read(environment, "ID") - first) // step, _read(environment, "COUNT")
    task, tasks = task or 0, 1 if tasks is None else tasks
    if tasks < 1:
        raise ValueError(f"--num-tasks ({tasks}) must be at least 1.")
    if not 0 <= task < tasks:
        raise ValueError(f"--task-id ({task}) must be 0 to {tasks - 1}, below --num-tasks ({tasks}).")
    return task, tasks


def _read(environment: Mapping[str, str], name: str, default: str = "") -> int:
    variable = f"SLURM_ARRAY_TASK_{name}"
    value = environment.get(variable, default)
    if not value.isdecimal():
        raise ValueError(
            f"{variable} ({value!r}) must be a number where SLURM_ARRAY_TASK_ID is set; give --task-id and "
            f"--num-tasks, or unset SLURM_ARRAY_TASK_ID."
        )
    return int(value)
