"""Ranks started by srun without torchrun: sets the variables that torch reads from those of SLURM.

Only inside a step of several tasks (`srun -n 8 python -m megatron_cm3leon.train ...`): the shell of sbatch or salloc
has many of the same variables, but is one process.
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

FIRST_PORT, PORTS = 20000, 12000
"""Below the ephemeral ports of Linux, which begin at 32768."""
STEP_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
)  # fmt: skip


def set_srun_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the current SLURM step.

    MASTER_ADDR and MASTER_PORT keep their values if they are set. Does nothing where RANK is set and outside a step of
    several tasks. ValueError when the address of the first node cannot be found, and in an interactive shell, which is
    only one of the step's processes.
    """
    if "RANK" in environment or not is_in_step(environment):
        return
    if is_interactive(environment):
        number = environment["SLURM_STEP_NUM_TASKS"]
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS ({number}) must be 1 in an interactive shell (srun --pty), where a command starts "
            f"one rank; use `torchrun --nproc-per-node N -m megatron_cm3leon.train ...` here, `srun -n {number} python "
            f"-m megatron_cm3leon.train ...` outside the shell, or RANK=0 for a run with one rank."
        )
    tasks = parse_tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(tasks[int(environment["SLURM_NODEID"])])
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = find_address(parse_first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(choose_port(environment)))


def is_in_step(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of an srun step."""
    several = int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1
    return several and all(name in environment for name in STEP_VARIABLES)


def is_interactive(environment: Mapping[str, str]) -> bool:
    """Whether a command in a shell or notebook of the step started this process, rather than srun or a script.

    An interactive shell gives each command its own process group. SLURM_PTY_PORT alone is not sufficient: further srun
    commands pass it on to their tasks.
    """
    in_terminal = "SLURM_PTY_PORT" in environment
    if not (in_terminal or os.isatty(0)):
        return False
    try:
        return os.getpgid(int(environment["SLURM_TASK_PID"])) != os.getpgrp()
    except (KeyError, ValueError, ProcessLookupError):  # in a container with its own PID namespace
        return in_terminal


def parse_tasks_per_node(text: str) -> list[int]:
    """Parse SLURM's notation of tasks per node: "2(x3),1" is [2, 2, 2, 1]."""
    tasks = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks


def parse_first_host(nodes: str) -> str:
    """First host of a SLURM node list such as "gpu[003-006,9],login1", where rank 0 runs."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    first = match[0] if match else nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def choose_port(environment: Mapping[str, str]) -> int:
    """A port, the same on every rank, that other jobs and steps on the node are unlikely to use."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return FIRST_PORT + (job * 37 + step) % PORTS


def find_address(host: str) -> str:
    """The host name if it resolves, else the address that SLURM uses for the node; ValueError if there is none."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except socket.gaierror:
        pass
    try:
        node = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):  # scontrol is missing in this container, or the controller is busy
        node = ""
    found = re.search(r"NodeAddr=(\S+)", node)
    if not found:
        raise ValueError(
            f"MASTER_ADDR is not set, and {host}, the first node of SLURM_STEP_NODELIST, cannot be resolved; set "
            f"MASTER_ADDR to an address of that node."
        )
    return found[1]
