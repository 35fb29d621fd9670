"""Training runs with injected faults on a rank, started by torchrun, or as plain processes like `srun` does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_cm3leon.monitoring.events import read_events
from megatron_cm3leon.runtime.peers import read_start_time
from tests.distributed.launch import ROOT, child_environment, find_free_ports

MARK = "WORLD_OF_RANKS"
"""Environment variable that identifies the processes of a run."""
RANK = ROOT / "tests" / "runtime" / "rank.py"


class World:
    """The ranks of one run: their output, their exit statuses, and their remaining processes."""

    def __init__(
        self,
        folder: Path,
        run: str,
        ranks: int,
        *overrides: str,
        launcher: str = "",
        pace=0.0,
        watchdog=900,
        faults=(),
    ):
        self.run, self.ranks = folder / run, ranks
        self.folder = folder / "worlds" / f"{run}-{time.monotonic_ns()}"
        self.folder.mkdir(parents=True)
        plan = self.folder / "faults.json"
        plan.write_text(json.dumps({"pace": pace, "watchdog": watchdog, "faults": list(faults)}))
        shards = folder / "shards"
        paths = [f"output={self.run}", f"data.shards={shards}", f"validation.shards={shards}"]
        script = [str(RANK), str(plan), str(folder / "config.yaml"), *paths, *overrides]
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        base = child_environment(**{MARK: str(self.folder)})
        base = {name: value for name, value in base.items() if name not in names}
        if launcher:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            self.processes = [self._start([*torchrun, *script], base, 0)]
            return
        [port] = find_free_ports(1)
        self.processes = []
        for rank in range(ranks):
            variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = base | {name: str(value) for name, value in variables.items()}
            self.processes.append(self._start([sys.executable, *script], environment, rank))

    def _start(self, command: list[str], environment: dict, number: int) -> subprocess.Popen:
        with open(self.folder / f"{number}.out", "w") as out, open(self.folder / f"{number}.err", "w") as err:
            return subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True)

    def output(self, ending: str = "err") -> str:
        """What all processes have printed so far."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*.{ending}")))

    def events(self, name: str = "") -> list[dict]:
        return [each for each in read_events(self.run) if not name or each["event"] == name]

    def wait_for(self, condition, seconds: float = 120) -> None:
        """Return when `condition()` is true; AssertionError with the output if that takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        """Return when metrics.jsonl has a line of `step`."""
        metrics = self.run / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())

    def list_processes(self) -> list[int]:
        """PIDs of all live processes of the run, loader workers included."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes()
            except OSError:  # the process has ended, or belongs to another user
                continue
            if f"{MARK}={self.folder}".encode() in environment.split(b"\0") and read_start_time(int(path.name)):
                found.append(int(path.name))
        return found

    def wait(self, seconds: float = 150) -> list[int]:
        """Exit statuses, once all processes of the run have ended; after `seconds`, kills them and raises an error."""
        deadline = time.monotonic() + seconds
        try:
            statuses = [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
            while remaining := self.list_processes():
                assert time.monotonic() < deadline, f"processes {remaining} still run\n{self.output()}"
                time.sleep(0.05)
        except (subprocess.TimeoutExpired, AssertionError):
            self.kill()
            print(self.output())
            raise
        return statuses

    def kill(self) -> None:
        """Kill the remaining processes."""
        for number in self.list_processes():
            os.kill(number, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def signal(self, number: int, rank: int) -> None:
        self.processes[rank].send_signal(number)
