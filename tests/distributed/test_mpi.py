"""Ranks from the variables of MPI launchers, or an error that names torchrun and srun."""

import pytest

from megatron_cm3leon.distributed.launch import Rank
from megatron_cm3leon.distributed.mpi import set_mpi_variables
from megatron_cm3leon.runtime import preflight
from megatron_cm3leon.train import main

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
INTEL = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {name.replace("OMPI_", "MV2_"): value for name, value in OPEN_MPI.items() if name != "PMIX_RANK"}
CRAY = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
STEP_OF_DAEMONS = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
LAUNCHERS = pytest.mark.parametrize("variables", [OPEN_MPI, INTEL, MVAPICH, CRAY], ids=["open", "intel", "mv2", "cray"])


def find_added_variables(variables):
    """Variables that set_mpi_variables() adds to these."""
    environment = dict(variables)
    set_mpi_variables(environment)
    return {name: value for name, value in environment.items() if name not in variables}


@LAUNCHERS
def test_processes_with_an_address_become_ranks(variables):
    found = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_added_variables(variables | ADDRESS) == found


@LAUNCHERS
def test_without_an_address_the_error_names_the_remedy(variables):
    with pytest.raises(
        ValueError, match=r"SIZE \(4\) says .* mpirun .* one of 4 ranks.*`torchrun .*`srun.*MASTER_ADDR"
    ):
        find_added_variables(variables)


def test_mpirun_in_a_slurm_job_takes_precedence_over_the_step_of_its_daemons():
    assert find_added_variables(OPEN_MPI | ADDRESS | STEP_OF_DAEMONS)["RANK"] == "3"
    with pytest.raises(ValueError, match="mpirun"):
        find_added_variables(INTEL | STEP_OF_DAEMONS)


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_RANK": "0", "PMI_SIZE": "2"},
        {"PMIX_RANK": "0"},
        {"MV2_COMM_WORLD_RANK": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"} | ADDRESS,
    ],
)
def test_a_launcher_that_sets_too_few_variables_is_an_error(variables):
    with pytest.raises(ValueError, match=r"_RANK \(0\) says that mpirun or another .*torchrun.*, or set RANK, WORLD"):
        find_added_variables(variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        OPEN_MPI | {"RANK": "0"},
        CRAY | {"SLURM_JOB_ID": "7"},
        {"PMIX_RANK": "1", "SLURM_JOB_ID": "7"},
    ],
    ids=["none", "torchrun under mpirun", "srun --mpi=cray", "srun --mpi=pmix"],
)
def test_variables_of_other_launchers_change_nothing(variables):
    assert find_added_variables(variables) == {}


def test_one_rank_needs_no_address():
    assert find_added_variables({"PMI_RANK": "0", "PMI_SIZE": "1"})["WORLD_SIZE"] == "1"
    assert (
        find_added_variables(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"})["WORLD_SIZE"] == "1"
    )


@pytest.fixture
def without_rank(monkeypatch):
    """monkeypatch, in an environment without the variables of a rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_size_without_a_rank_is_an_error(without_rank):
    without_rank.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE \(2\) is set but RANK is not"):
        Rank.from_environment()


def test_the_variables_of_the_deepspeed_launcher_are_read(without_rank):
    """The launcher sets LOCAL_SIZE, and passes --local_rank before the other arguments."""
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "4")):
        without_rank.setenv(name, value)
    assert Rank.from_environment() == Rank(5, 8, 1, 4)


def test_the_command_accepts_local_rank_and_reports_an_error_once(without_rank, capsys):
    without_rank.setattr("megatron_cm3leon.train.SECONDS_FOR_FIRST_RANK", 0)
    for number in range(2):
        without_rank.delenv("RANK", raising=False)
        for name, value in (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": str(number)}).items():
            without_rank.setenv(name, value)
        assert main([f"--local_rank={number}", "absent.yaml", "train.steps=1"]) == 2
        printed = capsys.readouterr().err
        assert ("torchrun" in printed) == (number == 0) and "unrecognized" not in printed


def test_preflight_reports_the_error_without_a_traceback(without_rank, capsys):
    for name, value in (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}).items():
        without_rank.setenv(name, value)
    assert preflight.main(["absent.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: OMPI_COMM_WORLD_SIZE (4)")
