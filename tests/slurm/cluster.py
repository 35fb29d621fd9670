"""A SLURM cluster of virtual nodes on this machine: real daemons in a separate folder on free ports, no systemd.

`python -m tests.slurm.cluster` starts one, prints the variable to set in a shell, and ends it on Ctrl-C. Partitions:

main    n1 and n2, 2 CPUs each          high    the same nodes; its jobs pre-empt main's (requeue)
grace   the same nodes; pre-empted jobs keep them for 20 s after SIGTERM
gpu     64 nodes of 8 GPUs that do not exist: for `sbatch --test-only`
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.distributed.launch import find_free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")
NODES = ("n1", "n2")
CPUS = 2
SECONDS_TO_START = 30
SECONDS_TO_STOP = 10
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}

# cred_expire: a requeued job waits for it, 121 s by default. sched_interval and bf_interval: jobs start immediately.
# The nodes of `gpu` are cloud nodes that never start, with which --test-only can plan.
CONFIGURATION = """\
ClusterName=fixture
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmdPidFile={folder}/pid/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=20
InactiveLimit=0
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=60
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=86400
ResumeTimeout=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
NodeName=g[1-64] CPUs=128 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1
PartitionName=grace Nodes=n1,n2 MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=20
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=g[1-64] MaxTime=INFINITE State=UP
"""


def reason_unavailable() -> str:
    """Why no cluster can be started on this machine; empty if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine; tests/slurm/install_slurm.sh installs them on Debian"
    if os.geteuid() != 0:
        return "munged and slurmd of these tests must run as root"
    try:
        socket.gethostbyname(_host())
    except OSError:
        return f"the name of this machine ({_host()}) has no address; add one to /etc/hosts for slurmctld"
    return ""


def _host() -> str:
    return socket.gethostname().split(".")[0]


class Cluster:
    """The daemons, and commands for tests. A context manager that ends all its processes on exit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def start(self) -> None:
        """Start munged, slurmctld and the nodes; RuntimeError with their logs when the nodes do not become idle."""
        self.folder.chmod(0o755)  # munged requires a socket that other users can reach, and a key that they cannot
        for name, mode in (("state", 0o755), ("log", 0o755), ("spool", 0o755), ("pid", 0o755), ("munge", 0o711)):
            (self.folder / name).mkdir()
            (self.folder / name).chmod(mode)
        key = self.folder / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        # Ports follow from job IDs, which must differ between two clusters on this machine.
        first_job = 100 * random.randrange(1, 1000)
        text = CONFIGURATION.format(
            folder=self.folder, host=_host(), ports=find_free_ports(3), cpus=CPUS, first_job=first_job
        )
        (self.folder / "slurm.conf").write_text(text)
        names = {"socket": "munge/socket", "seed-file": "munge/seed", "pid-file": "pid/munged.pid"}
        names |= {"key-file": "munge/key", "log-file": "log/munged.log"}
        self.run("munged", *(f"--{option}={self.folder / path}" for option, path in names.items()))
        self.run("slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def wait_for_nodes(self) -> None:
        """Return once every node of `main` is idle."""
        deadline = time.monotonic() + SECONDS_TO_START
        while self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False).split() != ["idle"] * len(NODES):
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted((self.folder / "log").iterdir()))
                raise RuntimeError(f"the nodes are not idle after {SECONDS_TO_START} s:\n{logs}")
            time.sleep(0.05)

    def kill_node(self, node: str) -> None:
        """Kill slurmd of a node and all processes of its jobs without notifying slurmctld, like a power failure."""
        pid = int((self.folder / f"pid/slurmd.{node}.pid").read_text())
        for process in [pid, *self._job_processes(f"SLURMD_NODENAME={node}")]:
            _kill(process, signal.SIGKILL)

    def kill_task(self, array: int | str, task: int) -> None:
        """Kill every process of an array's task, as the kernel does when memory runs out."""
        deadline = time.monotonic() + 30
        while not (found := self._job_processes(f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}")):
            assert time.monotonic() < deadline, f"task {task} of job {array} has no process"
            time.sleep(0.01)
        for process in found:
            _kill(process, signal.SIGKILL)

    def _job_processes(self, *required: str) -> list[int]:
        """PIDs of this cluster's jobs whose environment has the variables `required`."""
        conf = f"SLURM_CONF={self.folder}/slurm.conf"
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_text(errors="replace").split("\0")
            except OSError:
                continue  # the process has ended
            in_job = any(each.startswith("SLURM_JOB_ID=") for each in variables) or _is_step_daemon(path.parent)
            if in_job and {conf, *required} <= set(variables):
                found.append(int(path.parent.name))
        return found

    def run(self, *command: object, check: bool = True, **options) -> str:
        """Output of a command on this cluster; RuntimeError with its error message if it fails and `check` is set."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, timeout=120, **options
        )
        if check and done.returncode:
            message = done.stderr or done.stdout or f"exit status {done.returncode}"
            raise RuntimeError(f"{' '.join(map(str, command))}: {message}")
        return done.stdout

    def show(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`; of an array, those of its first task.

        On a busy machine, one call in thousands fails without a message; it is repeated.
        """
        command = "scontrol", "show", "job", "-o", job
        line = (self.run(*command, check=False) or self.run(*command)).splitlines()[0]
        return dict(field.partition("=")[::2] for field in line.split(" ") if "=" in field)

    def wait(self, job: int | str, *states: str, seconds: float = 240) -> dict[str, str]:
        """The job's fields once it is in one of `states` (default: those of a job that has ended)."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        deadline = time.monotonic() + seconds
        while (fields := self.show(job))["JobState"] not in (states or ended):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {fields['JobState']} ({fields.get('Reason')}) after {seconds} s")
            time.sleep(0.1)
        return fields

    @staticmethod
    def wait_for_steps(run: Path, count: int) -> None:
        """Return once a run's metrics have `count` lines."""
        deadline = time.monotonic() + 180
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= count):
            assert time.monotonic() < deadline, f"{run} has not logged {count} steps after 180 s"
            time.sleep(0.05)

    def stop(self) -> None:
        """End the jobs' processes and every daemon by PID."""
        pids = [int(path.read_text()) for path in sorted((self.folder / "pid").glob("*.pid"))]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_STOP
        while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in alive:
            _kill(pid, signal.SIGKILL)
        # A step daemon may be starting a task: repeat until no process is found.
        while (remaining := self._job_processes()) and time.monotonic() < deadline + SECONDS_TO_STOP:
            for pid in remaining:
                _kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def _is_step_daemon(process: Path) -> bool:
    """slurmstepd, which starts a job's tasks and outlives slurmd."""
    with suppress(OSError):
        return (process / "comm").read_text() == "slurmstepd\n"
    return False


def _kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> int:
    reason = reason_unavailable()
    if reason:
        print(f"error: {reason}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)):
        # Blocked, because a background job of a shell otherwise ignores SIGINT.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        print(f"export SLURM_CONF={folder}/slurm.conf   # in any shell; Ctrl-C here ends the cluster", flush=True)
        signal.sigwait(STOP_SIGNALS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
