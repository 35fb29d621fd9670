"""This process as a rank: its place among the others, its device and threads, and where the ranks meet."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_cm3leon.distributed.mpi import join_mpi
from megatron_cm3leon.distributed.srun import join_step

TIMEOUT = timedelta(minutes=30)


MEETING = timedelta(minutes=15)
"""Ranks start at different times: imports from a busy file system take minutes."""


@dataclass(frozen=True)
class Rank:
    """This process, before any process group exists; torchrun and srun set the environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> "Rank":
        """This rank as torchrun's, an MPI launcher's or, in an srun step, SLURM's variables say.

        ValueError as join_mpi() and join_step(), and for a WORLD_SIZE without RANK.
        """
        join_mpi()
        join_step()
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1 and "RANK" not in os.environ:
            raise ValueError(
                f"WORLD_SIZE ({world_size}) is set and RANK is not, so every process would be rank 0; start the ranks "
                f"with torchrun or srun, which set both, or unset WORLD_SIZE for a run of one rank."
            )
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            # LOCAL_SIZE is what DeepSpeed's launcher calls it.
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size),
        )


def choose_device(name: str, rank: Rank) -> torch.device:
    """`train.device` of this rank: auto is CUDA where every local rank can have a device of its own."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and devices < rank.local_world_size):
        return torch.device("cpu")
    if devices < rank.local_world_size:
        raise ValueError(
            f"train.device (cuda) needs a CUDA device for each of the {rank.local_world_size} ranks of this node, "
            f"which has {devices}; start fewer ranks or use train.device=cpu."
        )
    return torch.device("cuda", rank.local_rank)


def set_threads(threads: int, rank: Rank) -> None:
    """Give this rank `threads` CPU threads; 0 takes its share of the cores of this node."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // rank.local_world_size))


def uses_launchers_store() -> bool:
    """Whether torchrun hosts the store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(rank: Rank) -> dist.Store:
    """The store that the ranks share, without waiting for all of them; a run of one rank needs no address and no port.

    ValueError when no address is set or nobody answers there.
    """
    if rank.world_size == 1:
        return dist.HashStore()
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise ValueError(
            f"MASTER_ADDR ({host}) and MASTER_PORT ({port}) must name the first rank's host and a free port there; "
            f"start the ranks with torchrun or srun, which set them, or set both."
        )
    serves = rank.rank == 0 and not uses_launchers_store()
    try:
        store = dist.TCPStore(host, int(port), rank.world_size, serves, MEETING, wait_for_workers=False)
    except dist.DistError as error:
        what = "could not be opened" if serves else f"did not answer within {MEETING.seconds} s"
        raise ValueError(
            f"MASTER_ADDR ({host}) and MASTER_PORT ({port}) {what} ({str(error).splitlines()[0]}); see that rank 0 "
            f"runs on that host, that the port is free there, and that nodes may connect to it."
        ) from error
    store.set_timeout(TIMEOUT)
    return store


def gather_objects(value: object) -> list:
    """What every rank put in, in the order of the ranks; collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
