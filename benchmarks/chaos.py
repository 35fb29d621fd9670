"""Kill a random rank at a random moment, start the run again, and see that nothing had happened.

    python benchmarks/chaos.py --runs 50

First one run that nothing disturbs, then --runs runs under torchrun, in each of which one rank gets SIGKILL: at
start-up (while it imports, meets the others or builds the model), while a checkpoint is loaded (such a run is stopped
half way first, on request), while one is saved, or in a step. The same command starts it again until it is done. Each
run must then have the losses of the undisturbed one bit for bit, each batch once and in order, checkpoints that all
verify, and no process left; every attempt that was killed must have ended within 30 s.

Goodput: seconds of the steps that were kept / wall time from the first start to the last end. From death to step: from
the kill to the first step that a restart finished; what it costs to end, start and load again.
The simulator (benchmarks/failure_simulation.py) is given each run's kills, restarts and mean costs; the goodput of the
same steps in its time stands beside that by the run folder (monitoring/goodput.py), which begins with the first event.
Prints a table, and exits 1 when anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it also runs as a script

from benchmarks.failure_simulation import replay
from megatron_cm3leon.checkpoint.damage import find_damage
from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.common.cli import run_tool
from megatron_cm3leon.monitoring.events import read_events
from megatron_cm3leon.monitoring.goodput import read_time_breakdown
from megatron_cm3leon.monitoring.history import read_lines, read_metrics

ROOT = Path(__file__).parents[1]
MOMENTS = ("start-up", "load", "save", "step")
LONGEST_END = 30.0
"""Seconds from a rank's death to the end of the last process of its attempt."""
MARK = "CHAOS_RUN"
"""Environment variable by which the processes of a run are found."""
CONFIG = """
model: {layers: 2, hidden_size: 64, heads: 4, init_std: 0.02}
data: {seq_length: 64, packing: stream, workers: 1}
train: {global_batch_size: 8, micro_batch_size: 2, precision: fp32, threads: 1, device: cpu}
schedule: {warmup_steps: 5}
checkpoint: {keep_last: 0}
"""


@dataclass
class Result:
    """One run: what was done to it, and how it came out."""

    number: int
    moment: str
    rank: int
    killed_at: str = ""
    """The last thing on record when the rank was killed."""
    attempts: int = 0
    end_seconds: float = 0.0
    """From the kill to the end of the attempt's last process."""
    step_seconds: float = 0.0
    """From the kill to the first step that a restart finished."""
    goodput: float = 0.0
    breakdown_goodput: float = 0.0
    """By the run folder alone."""
    simulated_goodput: float = 0.0
    faults: list[str] = field(default_factory=list)


class Run:
    """Attempts of one run folder."""

    def __init__(self, folder: Path, name: str, options: argparse.Namespace) -> None:
        self.folder, self.run, self.options = folder, folder / name, options
        self.log = folder / f"{name}.log"
        self.environment = {**os.environ, MARK: str(self.run), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(self) -> subprocess.Popen:
        """Start one attempt."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={self.options.ranks}", "-m", "megatron_cm3leon.train"]
        fields = [f"output={self.run}", f"data.shards={self.folder / 'shards'}", f"train.steps={self.options.steps}"]
        fields += [f"checkpoint.interval={interval(self.options)}"]
        command = [*launcher, str(self.folder / "config.yaml"), *fields]
        with open(self.log, "a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=self.environment, start_new_session=True
            )

    def finish(self) -> int:
        """Start attempts until one ends well; how many it took. RuntimeError after three."""
        for attempt in range(3):
            if self.start().wait(600) == 0:
                return attempt + 1
        raise RuntimeError(f"{self.run} does not end well: {self.log.read_text()[-2000:]}")

    def processes(self) -> dict[int, int]:
        """The living processes of the run: process -> rank, -1 for the launcher and for loaders."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().split(b"\0")
                words = (path / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            if f"{MARK}={self.run}".encode() in environment and environment != [b""]:
                rank = next((int(each[5:]) for each in environment if each.startswith(b"RANK=")), -1)
                found[int(path.name)] = rank if b"torch.distributed.run" not in words else -1
        parents = {process: _parent(process) for process in found}
        return {process: -1 if parents[process] in found and found[parents[process]] >= 0 else rank
                for process, rank in found.items()}  # fmt: skip

    def losses(self) -> list[tuple]:
        return [(line["step"], line["batch"], line["loss"], line["grad_norm"]) for line in read_metrics(self.run)]


def interval(options: argparse.Namespace) -> int:
    """Steps between checkpoints."""
    return max(1, options.steps // 8)


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def wait_for(condition, seconds: float, what: str) -> None:
    """Return when `condition()` holds; RuntimeError when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come within {seconds:.0f} s")
        time.sleep(0.002)


def count_events(run: Run, name: str) -> int:
    return sum(event["event"] == name for event in read_events(run.run))


def stop_half_way(run: Run) -> None:
    """An attempt that a signal ends somewhere after its first checkpoint."""
    process = run.start()
    wait_for(lambda: count_events(run, "saved") or process.poll() is not None, 300, "the first checkpoint")
    for process_id, rank in run.processes().items():
        if rank == 0:
            os.kill(process_id, signal.SIGUSR1)
    process.wait(120)


def wait_for_moment(run: Run, moment: str, draw: random.Random, start_seconds: float) -> None:
    """Return at a random moment of the kind."""
    if moment == "start-up":
        starts, until = count_events(run, "start"), time.monotonic() + draw.random() * start_seconds
        wait_for(lambda: time.monotonic() > until or count_events(run, "start") > starts, 300, "the start")
    elif moment == "load":
        starts = count_events(run, "start")
        wait_for(lambda: count_events(run, "start") > starts, 300, "the start")
        time.sleep(draw.uniform(0, 0.5))  # reading data, building the model, reading the checkpoint
    elif moment == "save":
        folder, number = run.run / "checkpoints", draw.randrange(1, 7)
        wait_for(lambda: len({path.stem for path in folder.glob("step-*")}) >= number, 300, f"checkpoint {number}")
        time.sleep(draw.uniform(0, 0.02))
    else:
        step = draw.randrange(1, run.options.steps - 1)
        metrics = run.run / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= step, 300, f"step {step}")
        time.sleep(draw.uniform(0, 0.03))


def kill_once(run: Run, result: Result, draw: random.Random, start_seconds: float) -> float:
    """Start an attempt, kill a rank in it, and wait until nothing of it is left; the time of the kill."""
    launcher = run.start()
    wait_for(lambda: result.rank in run.processes().values(), 300, f"rank {result.rank}")
    wait_for_moment(run, result.moment, draw, start_seconds)
    victims = [process for process, rank in run.processes().items() if rank == result.rank]
    last = [event["event"] for event in read_events(run.run)][-1:]
    steps = len(read_metrics(run.run)) if (run.run / "metrics.jsonl").exists() else 0
    result.killed_at = f"{''.join(last) or 'nothing'}, {steps} steps"
    for process in victims:
        os.kill(process, signal.SIGKILL)
    died, killed = time.time(), time.monotonic()
    if not victims:
        result.killed_at += " (had ended)"
    launcher.wait(300)
    wait_for(lambda: not run.processes(), 300, "the end of all processes")
    result.end_seconds = time.monotonic() - killed
    return died


def check(run: Run, result: Result, straight: list[tuple], steps: int) -> None:
    """Fill result.faults with everything in which the run differs from an undisturbed one."""
    if run.losses() != straight:
        result.faults.append("losses differ")
    if [line["batch"] for line, _ in read_lines(run.run)] != list(range(steps)):
        result.faults.append("batches are not each there once")
    for attempt in {line["attempt"] for line in _all_lines(run)}:
        batches = [line["batch"] for line in _all_lines(run) if line["attempt"] == attempt]
        if batches != list(range(batches[0], batches[0] + len(batches))):
            result.faults.append(f"batches of attempt {attempt} are out of order")
    for folder in list_checkpoints(run.run):
        result.faults += [f"{folder.name}: {damage}" for damage in find_damage(folder, threads=1)]
    if run.processes():
        result.faults.append(f"processes are left: {sorted(run.processes())}")
    if result.end_seconds > LONGEST_END:
        result.faults.append(f"the attempt ended {result.end_seconds:.0f} s after the kill")


def _all_lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]


def run_once(
    folder: Path, number: int, options: argparse.Namespace, straight: list[tuple], start_seconds: float
) -> Result:
    """One disturbed run."""
    draw = random.Random(f"{options.seed} {number}")
    result = Result(number, MOMENTS[number % len(MOMENTS)], draw.randrange(options.ranks))
    run = Run(folder, f"run-{number}", options)
    began = time.monotonic()
    if result.moment == "load":
        stop_half_way(run)
        result.attempts += 1
    died = kill_once(run, result, draw, start_seconds)
    result.attempts += 1 + run.finish()
    wall = time.monotonic() - began
    after = [line["time"] for line in _all_lines(run) if line["time"] > died + result.end_seconds]
    result.step_seconds = after[0] - died if after else 0.0
    result.goodput = sum(line["step_seconds"] for line in read_metrics(run.run)) / wall
    times = read_time_breakdown(run.run)
    result.breakdown_goodput = times.goodput
    result.simulated_goodput = times.seconds["kept"] / replay(times, options.steps, interval(options)).wall
    check(run, result, straight, options.steps)
    if not result.faults and not options.keep:
        shutil.rmtree(run.run)
    return result


def prepare(folder: Path) -> None:
    """Shards and configuration of all runs."""
    from tests.data.corpora import make_pairs, make_vocabulary, write_shards

    write_shards(folder / "shards", make_pairs(200, make_vocabulary()), make_vocabulary())
    (folder / "config.yaml").write_text(CONFIG)


def show(results: list[Result]) -> None:
    """The table, one line a kind of moment."""
    print(f"{'killed in':10} {'runs':>5} {'faults':>7} {'goodput':>8} {'end s':>6} {'to step s':>9} {'longest':>8}")
    for moment in (*MOMENTS, "all"):
        some = [each for each in results if moment in (each.moment, "all")]
        if some:
            faults = sum(bool(each.faults) for each in some)
            to_step = [each.step_seconds for each in some]
            print(
                f"{moment:10} {len(some):5} {faults:7} {statistics.mean(each.goodput for each in some):8.1%} "
                f"{max(each.end_seconds for each in some):6.1f} {statistics.median(to_step):9.1f} {max(to_step):8.1f}"
            )
    found, simulated = (statistics.mean(getattr(each, f"{name}_goodput") for each in results)
                        for name in ("account", "simulated"))  # fmt: skip
    print(f"goodput by the run folders {found:.1%}, simulated {simulated:.1%}: {simulated / found:.3f} of it")
    for each in results:
        for fault in each.faults:
            print(f"run {each.number}, rank {each.rank} killed in {each.moment} ({each.killed_at}): {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="disturbed runs (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and ranks (default 0)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of a run (default 2)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run, 8 checkpoints (default 40)")
    parser.add_argument("--json", type=Path, help="file for the results of every run")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which are kept (default: a temporary one)")
    options = parser.parse_args()
    if options.runs < 1 or options.ranks < 1 or options.steps < 8:
        raise ValueError(f"--runs ({options.runs}) and --ranks ({options.ranks}) need 1, --steps ({options.steps}) 8.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        undisturbed = Run(folder, "undisturbed", options)
        began = time.time()
        undisturbed.finish()
        wall = time.time() - began
        straight, started = undisturbed.losses(), _all_lines(undisturbed)[0]["time"] - began
        kept = sum(line["step_seconds"] for line in read_metrics(undisturbed.run))
        print(f"undisturbed: first step after {started:.1f} s, goodput {kept / wall:.1%} of {wall:.1f} s", flush=True)
        results = []
        for number in range(options.runs):
            result = run_once(folder, number, options, straight, started)
            results.append(result)
            verdict = "; ".join(result.faults) or "same"
            print(
                f"run {number}: rank {result.rank} killed in {result.moment} ({result.killed_at}), ended after "
                f"{result.end_seconds:.1f} s, next step after {result.step_seconds:.1f} s: {verdict}",
                flush=True,
            )
    show(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")
    return int(any(each.faults for each in results))


if __name__ == "__main__":
    run_tool(main)
