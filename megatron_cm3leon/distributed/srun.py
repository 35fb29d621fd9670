"""Ranks that srun started, without torchrun: the variables that torch reads, from those that SLURM sets.

Only inside a step of several tasks (`srun -n 8 python -m megatron_cm3leon.train ...`): the shell of sbatch or salloc
has many of the same variables, and one process.
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

FIRST_PORT, PORTS = 20000, 12000
"""Below Linux's range for outgoing connections, which begins at 32768."""


def join_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the SLURM step we are in.

    What is set already stays. Does nothing under another launcher and outside such a step. ValueError when the first
    node has no address that this one can find, and in an interactive shell, which is one process of the step's several.
    """
    if "RANK" in environment or not is_in_step(environment):
        return
    if is_interactive(environment):
        tasks = environment["SLURM_STEP_NUM_TASKS"]
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS ({tasks}) must be 1 in an interactive shell (srun --pty), where a command starts "
            f"one rank; use `torchrun --nproc-per-node N -m megatron_cm3leon.train ...` here, `srun -n {tasks} python "
            f"-m megatron_cm3leon.train ...` outside of the shell, or RANK=0 for a run of one rank."
        )
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(tasks[int(environment["SLURM_NODEID"])])
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = address(first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(port(environment)))


def is_in_step(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of an srun step."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    needed += ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    several = int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1
    return several and all(name in environment for name in needed)


def is_interactive(environment: Mapping[str, str]) -> bool:
    """Whether a command typed in a shell or a notebook of the step started this process, and not srun or a script.

    An interactive shell gives each command a process group of its own. SLURM_PTY_PORT alone does not say it: further
    srun commands hand it on to their tasks.
    """
    in_terminal = "SLURM_PTY_PORT" in environment
    if not (in_terminal or os.isatty(0)):
        return False
    try:
        return os.getpgid(int(environment["SLURM_TASK_PID"])) != os.getpgrp()
    except (KeyError, ValueError, ProcessLookupError):  # in a container with process numbers of its own
        return in_terminal


def tasks_per_node(text: str) -> list[int]:
    """SLURM's "2(x3),1" as [2, 2, 2, 1]."""
    tasks = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks


def first_host(nodes: str) -> str:
    """First host of a SLURM list such as "gpu[003-006,9],login1": rank 0 is there."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def port(environment: Mapping[str, str]) -> int:
    """A port that other steps and jobs on the node are unlikely to share, the same on every rank."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return FIRST_PORT + (job * 37 + step) % PORTS


def address(host: str) -> str:
    """The host's name where it resolves; else the address that SLURM itself uses for that node."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except socket.gaierror:
        pass
    try:
        node = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):  # not in this container, or the controller is busy
        node = ""
    found = re.search(r"NodeAddr=(\S+)", node)
    if not found:
        raise ValueError(
            f"MASTER_ADDR is not set, and {host}, the first node of SLURM_STEP_NODELIST, has no address here; set "
            f"MASTER_ADDR to an address of that node."
        )
    return found[1]
