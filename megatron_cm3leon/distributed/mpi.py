"""Ranks started by an MPI launcher (mpirun, mpiexec, jsrun): sets the variables that torch reads from those of MPI.

MPI launchers provide no address for the rendezvous. With MASTER_ADDR and MASTER_PORT set, the ranks are read; without
them each process would be a run with one rank, so such a start is an error.
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
class LauncherVariables:
    """Names of the environment variables that one launcher sets."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_NAMES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
MPI = (
    LauncherVariables(*(f"OMPI_COMM_WORLD_{name}" for name in _NAMES)),  # Open MPI and jsrun
    LauncherVariables(*(f"MV2_COMM_WORLD_{name}" for name in _NAMES)),
    LauncherVariables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
)
"""Variables that srun never sets: they are valid inside a SLURM step too, where mpirun starts its daemons."""
PMI = (LauncherVariables("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),)
"""Set by Cray's mpiexec, and by srun, whose own variables are read instead (srun.py)."""


def set_mpi_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from the MPI launcher that started this process.

    Does nothing where RANK is set, and under another launcher. ValueError with several ranks and no MASTER_ADDR or
    MASTER_PORT, or when the launcher does not set which ranks are on which node; RANK is set then too, so that only
    rank 0 prints the error.
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
    size = environment.get(found.size, "")
    if size != "1" and not complete:
        _refuse(found.rank, environment)
    environment["RANK"] = environment[found.rank]
    if size != "1" and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise ValueError(
            f"{found.size} ({size}) says that mpirun or mpiexec started this process as one of {size} ranks, but the "
            f"address for their rendezvous is not set; {REMEDY}, or pass MASTER_ADDR (the host of rank 0) and "
            f"MASTER_PORT (a free port on it) to every rank."
        )
    environment["WORLD_SIZE"] = size
    environment["LOCAL_RANK"] = environment.get(found.local_rank, "0")
    environment["LOCAL_WORLD_SIZE"] = environment.get(found.local_size, "1")


def _refuse(name: str, environment: MutableMapping[str, str]) -> NoReturn:
    """ValueError for a launcher that does not set all required variables."""
    environment["RANK"] = environment[name]
    raise ValueError(
        f"{name} ({environment[name]}) says that mpirun or another MPI launcher started this process, but not which "
        f"ranks are on which node; {REMEDY}, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR "
        f"and MASTER_PORT."
    )
