"""This process as a rank: rank and world size, device, CPU threads, and the rendezvous with the other ranks."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_cm3leon.distributed.mpi import set_mpi_variables
from megatron_cm3leon.distributed.srun import set_srun_variables

TIMEOUT = timedelta(minutes=30)
"""For operations on the store and for collectives."""
RENDEZVOUS_TIMEOUT = timedelta(minutes=15)
"""Ranks start at different times: imports from a busy file system take minutes."""


@dataclass(frozen=True)
class Rank:
    """Rank and world size of this process, from the environment; no process group is needed."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> "Rank":
        """Read the variables of torchrun, of an MPI launcher or, in an srun step, of SLURM.

        ValueError as set_mpi_variables() and set_srun_variables(), and for a WORLD_SIZE without RANK.
        """
        set_mpi_variables()
        set_srun_variables()
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1 and "RANK" not in os.environ:
            raise ValueError(
                f"WORLD_SIZE ({world_size}) is set but RANK is not, so every process would be rank 0; start the ranks "
                f"with torchrun or srun, which set both, or unset WORLD_SIZE for a run with one rank."
            )
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            # DeepSpeed's launcher names it LOCAL_SIZE.
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size),
        )


def choose_device(name: str, rank: Rank) -> torch.device:
    """The device of this rank for `train.device` (auto, cuda, cpu); auto is CUDA if each local rank has its own device.

    ValueError for cuda with fewer devices than local ranks.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and devices < rank.local_world_size):
        return torch.device("cpu")
    if devices < rank.local_world_size:
        raise ValueError(
            f"train.device (cuda) requires a CUDA device for each of the {rank.local_world_size} ranks of this "
            f"node, which has {devices}; start fewer ranks or use train.device=cpu."
        )
    return torch.device("cuda", rank.local_rank)


def set_threads(threads: int, rank: Rank) -> None:
    """Set the number of CPU threads per rank; 0 divides the cores of this node by its ranks."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // rank.local_world_size))


def uses_launcher_store() -> bool:
    """Whether torchrun hosts the store of the rendezvous; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def rendezvous(rank: Rank) -> dist.Store:
    """Connect to the store that all ranks share, without waiting for them. One rank alone needs no address or port.

    ValueError when MASTER_ADDR or MASTER_PORT is not set, or no store answers there within RENDEZVOUS_TIMEOUT.
    """
    if rank.world_size == 1:
        return dist.HashStore()
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise ValueError(
            f"MASTER_ADDR ({host}) and MASTER_PORT ({port}) must be the host of rank 0 and a free port on it; "
            f"start the ranks with torchrun or srun, which set them, or set both."
        )
    hosts_store = rank.rank == 0 and not uses_launcher_store()
    try:
        store = dist.TCPStore(host, int(port), rank.world_size, hosts_store, RENDEZVOUS_TIMEOUT, wait_for_workers=False)
    except dist.DistError as error:
        what = "could not be opened" if hosts_store else f"did not respond within {RENDEZVOUS_TIMEOUT.seconds} s"
        raise ValueError(
            f"MASTER_ADDR ({host}) and MASTER_PORT ({port}) {what} ({str(error).splitlines()[0]}); make sure that "
            f"rank 0 runs on that host, that the port is free there, and that the other nodes can connect to it."
        ) from error
    store.set_timeout(TIMEOUT)
    return store


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks; collective. They must be picklable.

    Without process groups, in a tool, there is one rank.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
