"""Ranks that an MPI launcher started (mpirun, mpiexec, jsrun): the variables that torch reads, from those that it sets.

MPI launchers name no address where ranks can meet. With MASTER_ADDR and MASTER_PORT the ranks are read; without them
each process would take itself for a run of one rank, so they are refused at once.
"""

import os
from collections.abc import MutableMapping
from dataclasses import astuple, dataclass
from typing import NoReturn

REMEDY = (
    "start with `torchrun --nproc-per-node N -m megatron_cm3leon.train ...` or `srun -n N python -m "
    "megatron_cm3leon.train ...`"
)


@dataclass(frozen=True)
class Variables:
    """What the processes of one launcher have in their environment."""

    rank: str
    size: str
    local_rank: str
    local_size: str


MPI = (
    Variables(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),  # and jsrun
    Variables(*(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
)
"""Launchers whose processes srun never imitates: they count inside a SLURM step too, in which mpirun starts helpers."""
PMI = (Variables("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),)
"""Cray's mpiexec, and srun, whose own variables are read instead (slurm_step.py)."""


def join_mpi(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from the MPI launcher that started this process.

    Does nothing where RANK is set, and under no MPI launcher. ValueError for one of several ranks without MASTER_ADDR
    and MASTER_PORT, or whose launcher does not say which ranks there are on which node; RANK is set then too, so that
    one rank reports.
    """
    if "RANK" in environment:
        return
    in_slurm = "SLURM_JOB_ID" in environment
    known = MPI if in_slurm else MPI + PMI
    complete = next((each for each in known if all(name in environment for name in astuple(each))), None)
    found = complete
    if not in_slurm:
        found = found or next((each for each in known if each.rank in environment), None)
    if found is None:
        if "PMIX_RANK" in environment and not in_slurm:
            _refuse("PMIX_RANK", environment)
        return
    size = environment.get(found.size)
    if size != "1" and not complete:
        _refuse(found.rank, environment)
    environment["RANK"] = environment[found.rank]
    if size != "1" and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise ValueError(
            f"{found.size} ({size}) says that mpirun or mpiexec started this process as one of {size} ranks, but not "
            f"where they meet; {REMEDY}, or pass MASTER_ADDR (the first rank's host) and MASTER_PORT (a free port "
            f"there) to every rank."
        )
    environment["WORLD_SIZE"] = size
    environment["LOCAL_RANK"] = environment.get(found.local_rank, "0")
    environment["LOCAL_WORLD_SIZE"] = environment.get(found.local_size, "1")


def _refuse(name: str, environment: MutableMapping[str, str]) -> NoReturn:
    """ValueError for a rank whose launcher sets less than is needed."""
    environment["RANK"] = environment[name]
    raise ValueError(
        f"{name} ({environment[name]}) says that mpirun or another MPI launcher started this process, but not which "
        f"ranks there are on which node; {REMEDY}, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR "
        f"and MASTER_PORT."
    )
