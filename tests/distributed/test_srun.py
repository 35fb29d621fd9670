"""Ranks from SLURM's variables: only in a step of several tasks."""

import os

import pytest

from megatron_cm3leon.distributed.srun import (
    choose_port,
    find_address,
    parse_first_host,
    parse_tasks_per_node,
    set_srun_variables,
)

STEP = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_a_task_of_a_step_becomes_a_rank():
    environment = dict(STEP)
    set_srun_variables(environment)
    found = {name: value for name, value in environment.items() if name not in STEP}
    expected = {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert found == expected | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(20000 + 123 * 37)}


@pytest.mark.parametrize(
    "change",
    [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": ""}],
    ids=["torchrun inside a step", "one task", "the shell of sbatch or salloc"],
)
def test_other_environments_do_not_change(change):
    environment = STEP | change
    before = dict(environment)
    set_srun_variables(environment)
    assert environment == before


@pytest.mark.parametrize("task", [None, "1", "4194305"], ids=["not set", "another process group", "another machine"])
def test_an_interactive_shell_of_several_tasks_is_an_error_with_the_remedy(task):
    environment = STEP | {"SLURM_PTY_PORT": "33333"} | ({"SLURM_TASK_PID": task} if task else {})
    with pytest.raises(ValueError, match=r"\(5\) must be 1 in an interactive shell .*`torchrun .*`srun -n 5 .*RANK=0"):
        set_srun_variables(environment)
    assert "RANK" not in environment
    set_srun_variables(environment | {"RANK": "0"})  # torchrun in that shell


def test_a_script_and_srun_in_a_shell_with_a_terminal_are_not_interactive():
    """srun passes SLURM_PTY_PORT on to the tasks of further steps; a script has the process group of its task."""
    environment = STEP | {"SLURM_PTY_PORT": "33333", "SLURM_TASK_PID": str(os.getpid())}
    set_srun_variables(environment)
    assert environment["RANK"] == "4"


def test_an_existing_address_is_kept():
    environment = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    set_srun_variables(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_lists_of_nodes_and_tasks_are_parsed():
    hosts = {"gpu1": "gpu1", "gpu[003-006,9],login1": "gpu003", "a,b": "a", "rack[1-2]n[07,9]x": "rack1n07x"}
    assert {text: parse_first_host(text) for text in hosts} == hosts
    assert parse_tasks_per_node("2(x3),1") == [2, 2, 2, 1] and parse_tasks_per_node("8") == [8]


def test_jobs_and_steps_have_different_ports():
    numbers = [(str(job), str(step)) for job in range(300) for step in range(8)]
    ports = {choose_port({"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}) for job, step in numbers}
    assert len(ports) == 2400 and min(ports) >= 20000 and max(ports) < 32768


def test_a_node_without_an_address_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"no-such-node\.invalid, the first node .*; set MASTER_ADDR"):
        find_address("no-such-node.invalid")
