"""Batch scripts for sbatch: complete, readable, and independent of who submits them.

A script starts its command through srun, in the site's container if there is one. That of a training job also sets up
the rendezvous, forwards SIGUSR1 to the ranks, and runs requeue.py after they have ended.
"""

import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.slurm.site import Site

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("srun", "torchrun")
ENVIRONMENT = {"NCCL_DEBUG": "WARN", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1"}
"""Environment of every job; the site's `environment` overrides it. With one connection, kernels start in the order of
their launch: megatron-core requires this to overlap tensor-parallel communication with computation."""
SECONDS_FOR_LAST_RANK = 25
"""Time that srun gives the other ranks after the first has ended, to finish saving or to report their error."""


@dataclass(kw_only=True)
class Job:
    """The resources of a job, and its script's settings."""

    name: str
    log: Path
    """Output file; SLURM replaces %j by the job ID, %A by the array's ID and %a by the task's."""
    time: str
    nodes: int = 1
    tasks_per_node: int = 1
    """srun tasks per node."""
    cpus_per_task: int = 0
    """CPU cores per srun task; 0: SLURM's default."""
    gpus_per_node: int = 0
    array: int = 0
    """Number of tasks of a job array; 0: no array."""
    signal_time: int = 0
    """Seconds before the time limit at which the batch script receives SIGUSR1; 0: never."""
    site: Site = field(default_factory=Site)
    folders: list[Path] = field(default_factory=list)
    """Folders that the job reads or writes; they are mounted in a container."""


def build_header(job: Job) -> str:
    """The #SBATCH lines, and the environment of the commands."""
    site = job.site
    options = {
        "job-name": job.name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": job.cpus_per_task,
        "gpus-per-node": job.gpus_per_node,
        "mem": site.memory,
        "time": job.time,
        "array": f"0-{job.array - 1}" if job.array else "",
        "signal": f"B:USR1@{job.signal_time}" if job.signal_time else "",
        "open-mode": "append",
        "output": _escape_log(job.log),
        "chdir": Path.cwd(),
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={_quote(value)}" for name, value in options.items() if value)]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in site.sbatch)]
    lines += ["# Written by tools/submit.py; `sbatch` of this file submits the same job again.", ""]
    lines += [*site.setup, *(f"module load {shlex.quote(module)}" for module in site.modules)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in {**ENVIRONMENT, **site.environment}.items()]
    lines += [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}", ""]
    return "\n".join(lines)


def _quote(value: object) -> str:
    """Quote a value of an #SBATCH line, in which sbatch reads quotes and comments like a shell, but expands nothing."""
    text = str(value)
    if not re.search(r"""[\s"'#\\]""", text):
        return text
    return '"' + re.sub(r"""(["\\])""", r"\\\1", text) + '"'


def _escape_log(log: Path) -> str:
    """The log for --output, with each `%` of its folder escaped; ValueError for characters that SLURM rejects."""
    if "\\" in str(log) or "\n" in str(log):
        raise ValueError(
            f"output ({log.parent.parent}) has a backslash or a line break, which SLURM does not allow in the name "
            f"of a log; choose another output."
        )
    return str(log.parent).replace("%", "%%") + f"/{log.name}"


def list_srun_options(job: Job) -> list[str]:
    """Options of every srun of the job. Since SLURM 22.05 srun does not inherit --cpus-per-task from sbatch."""
    options = [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    container = job.site.container
    if container.image and container.runtime == "pyxis":
        mounts = ",".join(list_mounts(job))
        options += [f"--container-image={container.image}", f"--container-mounts={mounts}", *container.options]
    return [*options, *job.site.srun]


def build_container_command(job: Job) -> list[str]:
    """The words before a command that runs in an apptainer container; none without one."""
    container = job.site.container
    if not container.image or container.runtime != "apptainer":
        return []
    gpus = ["--nv"] if job.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", ",".join(list_mounts(job)), *container.options, container.image]


def list_mounts(job: Job) -> list[str]:
    """The site's mounts, then those folders of the project and the job that no mount contains."""
    mounts = list(job.site.container.mounts)
    for folder in map(Path, (ROOT, *job.folders)):
        mounted = [Path(mount.partition(":")[0]) for mount in mounts]
        if not any(folder.absolute().is_relative_to(parent) for parent in mounted):
            mounts.append(str(folder.absolute()))
    return mounts


def find_python(site: Site) -> str:
    """Python interpreter of the jobs."""
    return site.python or ("python" if site.container.image else sys.executable)


def join_words(words: Iterable[object]) -> str:
    """Quote words for bash and join them to one command."""
    return shlex.join(map(str, words))


def build_command_script(job: Job, words: list[object], suffix: str = "") -> str:
    """A script that runs one command in one srun task; `suffix` is unquoted bash after the words."""
    command = join_words(
        ["srun", "--ntasks=1", *list_srun_options(job), *build_container_command(job), find_python(job.site), *words]
    )
    return f"{build_header(job)}exec {command}{suffix}\n"


def build_training_script(job: Job, run: Path, words: list[object], launcher: str, ranks: int, restarts: int) -> str:
    """A script that trains with `ranks` ranks per node and requeues itself as requeue.py decides.

    `words`: the training command's arguments. `restarts`: cluster.max_restarts.
    """
    python = find_python(job.site)
    train = ["-m", "megatron_cm3leon.train", *words]
    # --wait: when a rank ends, for any reason, srun must not end the ranks that still write the checkpoint.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={SECONDS_FOR_LAST_RANK}", *list_srun_options(job)]
    launch = join_words([*srun, *build_container_command(job), python, *train])  # the ranks read SLURM's variables
    if launcher == "torchrun":
        start = join_words([python, "-m", "torch.distributed.run", *train])
        launch = f"{join_words([*srun, *build_container_command(job), 'bash', '-c'])} '{TORCHRUN_TASK}' rank {start}"
    container = job.site.container
    in_pyxis = bool(container.image) and container.runtime == "pyxis"
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", *list_srun_options(job)] if in_pyxis else []
    requeue = join_words([*step, *build_container_command(job), python, "-m", "megatron_cm3leon.slurm.requeue", run])
    return build_header(job) + TRAINING.format(launch=launch, requeue=requeue, ranks=ranks, restarts=restarts)


# SLURM signals the task, which is this shell (and, without cgroups, all processes below it). torchrun would end on
# SIGUSR1, and would end its ranks 30 s after SIGTERM. So torchrun ignores SIGUSR1, and this shell forwards both signals
# to its children, the ranks.
TORCHRUN_TASK = """
    export PET_NODE_RANK=$SLURM_NODEID PET_NNODES=$SLURM_JOB_NUM_NODES PET_NPROC_PER_NODE=$RANKS_PER_NODE
    export PET_MASTER_ADDR=$MASTER_ADDR PET_MASTER_PORT=$MASTER_PORT
    (trap "" USR1; exec "$@") &
    torchrun=$!
    forward() { kill -s "$1" $(cat /proc/$torchrun/task/$torchrun/children) 2>/dev/null; }
    trap "forward USR1" USR1
    trap "forward TERM" TERM
    while kill -0 $torchrun 2>/dev/null; do wait $torchrun; done
    wait $torchrun
"""

TRAINING = """\
since=$(date +%s)
received="" ranks=""
forward() {{
    received=$1
    if [ -n "$ranks" ]; then kill -USR1 "$ranks"; fi  # srun forwards it to every rank
}}
trap 'forward USR1' USR1    # the time limit is near: sbatch --signal
trap 'received=TERM' TERM   # SLURM ends the job; it signals the ranks itself

# Rendezvous: SLURM's address of the first node, which is this one; the port follows from the job ID, or is the next
# one that is free here.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
RANKS_PER_NODE={ranks}
export MASTER_ADDR MASTER_PORT RANKS_PER_NODE

launch() {{
    exec {launch}
}}
launch &
ranks=$!
if [ "$received" = USR1 ]; then kill -USR1 "$ranks"; fi
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done  # a trap interrupts `wait`
wait "$ranks"
status=$?
trap '' USR1

decision=$({requeue} --status "$status" --signal "$received" --since "$since" --max-restarts {restarts} \\
    --job "$(scontrol show job -o "$SLURM_JOB_ID")")
case $decision in
    requeue)
        scontrol requeue "$SLURM_JOB_ID" || exit "$((status ? status : 1))"
        sleep 60  # SLURM ends this script; an exit here would end the job
        ;;
    end\\ *) exit "${{decision#end }}" ;;
    *) exit "$((status ? status : 1))" ;;  # requeue.py failed: its error is above
esac
"""
