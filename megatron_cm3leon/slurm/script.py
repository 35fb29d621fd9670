"""Batch scripts: what sbatch is given. Readable, complete, and the same for everybody who reads one.

A script starts its command through srun, in the site's container where there is one. That of a training job also finds
the rendezvous, passes SIGUSR1 on to the ranks, and asks requeue.py what comes next once they have ended.
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
"""Of every job, below the site's `environment`. One connection: kernels start in the order of their launch, which
megatron-core's overlap of tensor parallel communication with computation relies on."""
SECONDS_FOR_LAST_RANK = 25
"""What srun leaves the other ranks once the first has ended: they finish saving, or tell their error, or are ended."""


@dataclass(kw_only=True)
class Job:
    """What a job asks of SLURM."""

    name: str
    log: Path
    """File of the output; %j stands for the job's number, %A and %a for an array's and its task's."""
    time: str
    nodes: int = 1
    tasks_per_node: int = 1
    """srun tasks on a node."""
    cpus_per_task: int = 0
    """CPU cores of an srun task; 0 leaves them to SLURM."""
    gpus_per_node: int = 0
    array: int = 0
    """Tasks of a job array; 0 is no array."""
    lead: int = 0
    """Seconds before the end at which the batch script gets SIGUSR1; 0 is never."""
    site: Site = field(default_factory=Site)
    folders: list[Path] = field(default_factory=list)
    """What the job reads and writes: mounted in a container."""


def write_header(job: Job) -> str:
    """The #SBATCH lines, and the environment of every command below them."""
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
        "signal": f"B:USR1@{job.lead}" if job.lead else "",
        "open-mode": "append",
        "output": _escape_log(job.log),
        "chdir": Path.cwd(),
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={_quote(value)}" for name, value in options.items() if value)]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in site.sbatch)]
    lines += ["# Written by tools/submit.py; `sbatch` of this file is the same job again.", ""]
    lines += [*site.setup, *(f"module load {shlex.quote(module)}" for module in site.modules)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in {**ENVIRONMENT, **site.environment}.items()]
    lines += [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}", ""]
    return "\n".join(lines)


def _quote(value: object) -> str:
    """A value of an #SBATCH line, which sbatch splits like a shell, quotes and comments too, but does not expand."""
    text = str(value)
    if not re.search(r"""[\s"'#\\]""", text):
        return text
    return '"' + re.sub(r"""(["\\])""", r"\\\1", text) + '"'


def _escape_log(log: Path) -> str:
    """The log as --output takes it: `%` of a folder's name is no pattern. ValueError for what SLURM cannot name."""
    if "\\" in str(log) or "\n" in str(log):
        raise ValueError(
            f"output ({log.parent.parent}) has a backslash or a line break, which SLURM takes in no log's name; "
            f"choose another."
        )
    return str(log.parent).replace("%", "%%") + f"/{log.name}"


def srun_options(job: Job) -> list[str]:
    """Of every srun: since SLURM 22.05 it no longer takes --cpus-per-task from sbatch."""
    cpus = [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    container = job.site.container
    if container.image and container.runtime == "pyxis":
        mounts = ",".join(list_mounts(job))
        cpus += [f"--container-image={container.image}", f"--container-mounts={mounts}", *container.options]
    return [*cpus, *job.site.srun]


def container_prefix(job: Job) -> list[str]:
    """What stands before a command that runs in an apptainer container; nothing otherwise."""
    container = job.site.container
    if not container.image or container.runtime != "apptainer":
        return []
    gpus = ["--nv"] if job.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", ",".join(list_mounts(job)), *container.options, container.image]


def list_mounts(job: Job) -> list[str]:
    """The site's mounts, then the project's folder and those of the job that none of them holds."""
    mounts = list(job.site.container.mounts)
    for folder in map(Path, (ROOT, *job.folders)):
        held = [Path(mount.partition(":")[0]) for mount in mounts]
        if not any(folder.absolute().is_relative_to(mount) for mount in held):
            mounts.append(str(folder.absolute()))
    return mounts


def find_python(site: Site) -> str:
    """Interpreter of the jobs."""
    return site.python or ("python" if site.container.image else sys.executable)


def join(words: Iterable[object]) -> str:
    """Words as bash reads them again."""
    return shlex.join(map(str, words))


def write_command_script(job: Job, words: list[object], more: str = "") -> str:
    """A script that runs one command in one srun task; `more` is bash of its own behind the words."""
    command = join(["srun", "--ntasks=1", *srun_options(job), *container_prefix(job), find_python(job.site), *words])
    return f"{write_header(job)}exec {command}{more}\n"


def write_training_script(job: Job, run: Path, words: list[object], launcher: str, ranks: int, restarts: int) -> str:
    """A script that trains with `ranks` ranks a node, and starts again as long as that helps.

    `words`: the training command's arguments. `restarts`: cluster.max_restarts.
    """
    python = find_python(job.site)
    train = ["-m", "megatron_cm3leon.train", *words]
    # --wait: a rank that ends, however it ends, must not end the one that still writes the checkpoint.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={SECONDS_FOR_LAST_RANK}", *srun_options(job)]
    launch = join([*srun, *container_prefix(job), python, *train])  # the ranks know SLURM's variables
    if launcher == "torchrun":
        start = join([python, "-m", "torch.distributed.run", *train])
        launch = f"{join([*srun, *container_prefix(job), 'bash', '-c'])} '{TORCHRUN_TASK}' rank {start}"
    ask = ["srun", "--overlap", "--nodes=1", "--ntasks=1", *srun_options(job)] if _in_pyxis(job) else []
    asking = join([*ask, *container_prefix(job), python, "-m", "megatron_cm3leon.slurm.requeue", run])
    return write_header(job) + TRAINING.format(launch=launch, ask=asking, ranks=ranks, restarts=restarts)


def _in_pyxis(job: Job) -> bool:
    return bool(job.site.container.image) and job.site.container.runtime == "pyxis"


# SLURM signals the task, which is this shell (and, without cgroups, all below it). torchrun would end on SIGUSR1, and
# end its ranks 30 s after SIGTERM; so it ignores the one, and its children, the ranks, get both from here.
TORCHRUN_TASK = """
    export PET_NODE_RANK=$SLURM_NODEID PET_NNODES=$SLURM_JOB_NUM_NODES PET_NPROC_PER_NODE=$RANKS_PER_NODE
    export PET_MASTER_ADDR=$MASTER_ADDR PET_MASTER_PORT=$MASTER_PORT
    (trap "" USR1; exec "$@") &
    torchrun=$!
    tell() { kill -s "$1" $(cat /proc/$torchrun/task/$torchrun/children) 2>/dev/null; }
    trap "tell USR1" USR1
    trap "tell TERM" TERM
    while kill -0 $torchrun 2>/dev/null; do wait $torchrun; done
    wait $torchrun
"""

TRAINING = """\
since=$(date +%s)
asked="" ranks=""
ask() {{
    asked=$1
    if [ -n "$ranks" ]; then kill -USR1 "$ranks"; fi  # srun passes it on to every rank
}}
trap 'ask USR1' USR1        # time is running out: sbatch --signal
trap 'asked=TERM' TERM      # SLURM ends the job; it tells the ranks itself

# Rendezvous: the first node's address as SLURM knows it (this node); a port by the job's number, the next one that is
# free here where somebody listens on it.
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
if [ "$asked" = USR1 ]; then kill -USR1 "$ranks"; fi
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done  # a trap interrupts `wait`
wait "$ranks"
status=$?
trap '' USR1

verdict=$({ask} --status "$status" --signal "$asked" --since "$since" --max-restarts {restarts} \\
    --job "$(scontrol show job -o "$SLURM_JOB_ID")")
case $verdict in
    requeue)
        scontrol requeue "$SLURM_JOB_ID" || exit "$((status ? status : 1))"
        sleep 60  # SLURM ends this script; its own exit status would end the job
        ;;
    end\\ *) exit "${{verdict#end }}" ;;
    *) exit "$((status ? status : 1))" ;;  # requeue.py could not run: its error stands above
esac
"""
