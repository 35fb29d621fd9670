"""Kill a random rank at a random moment, restart the run, and check that it equals an undisturbed run.

    python benchmarks/chaos.py --runs 50

First one undisturbed run, then --runs runs under torchrun. In each of these, one rank gets SIGKILL: at start-up (while
it imports, joins the rendezvous or builds the model), while a checkpoint is loaded (such a run is first stopped half
way by a signal), while a checkpoint is saved, or in a step. The same command then restarts the run until it completes.
Each run must have bit-identical losses to the undisturbed run, each batch once and in order, only checkpoints that
verify, and no remaining process; every killed attempt must end within 30 s.

Goodput: seconds of the kept steps / wall time from the first start to the last end. "To step": seconds from the kill to
the first step of the restart, which includes ending the attempt, starting again and loading. The simulator
(benchmarks/failure_simulation.py) replays each run's kills, restarts and mean costs; its goodput is compared with the
goodput according to the run folder (monitoring/goodput.py), whose wall time begins with the first event. Prints a table
and exits with status 1 if anything differs.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # for running this file as a script

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
"""Maximum seconds from the kill of a rank to the end of the last process of its attempt."""
MARK = "CHAOS_RUN"
"""Environment variable that identifies the processes of a run."""
CONFIG = """
model: {layers: 2, hidden_size: 64, heads: 4, init_std: 0.02}
data: {seq_length: 64, packing: stream, workers: 1}
train: {global_batch_size: 8, micro_batch_size: 2, precision: fp32, threads: 1, device: cpu}
schedule: {warmup_steps: 5}
checkpoint: {keep_last: 0}
"""


@dataclass
class Result:
    """One disturbed run: its kill and its outcome."""

    number: int
    moment: str
    rank: int
    killed_at: str = ""
    """Last event and number of recorded steps when the rank was killed."""
    attempts: int = 0
    end_seconds: float = 0.0
    """From the kill to the end of the attempt's last process."""
    step_seconds: float = 0.0
    """From the kill to the first completed step of the restart."""
    goodput: float = 0.0
    breakdown_goodput: float = 0.0
    """According to the run folder."""
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
        """Start attempts until one succeeds, and return their number. RuntimeError after three failures."""
        for attempt in range(3):
            if self.start().wait(600) == 0:
                return attempt + 1
        raise RuntimeError(f"{self.run} failed three times; end of its log: {self.log.read_text()[-2000:]}")

    def processes(self) -> dict[int, int]:
        """The running processes of the run: process id -> rank; -1 for the launcher and for loader workers."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().split(b"\0")
                words = (path / "cmdline").read_bytes()
            except OSError:  # the process has ended
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
    """Return once `condition()` is true; RuntimeError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out after {seconds:.0f} s waiting for {what}")
        time.sleep(0.002)


def count_events(run: Run, name: str) -> int:
    return sum(event["event"] == name for event in read_events(run.run))


def stop_half_way(run: Run) -> None:
    """Run one attempt and stop it with a signal after its first checkpoint."""
    process = run.start()
    wait_for(lambda: count_events(run, "saved") or process.poll() is not None, 300, "the first checkpoint")
    for process_id, rank in run.processes().items():
        if rank == 0:
            os.kill(process_id, signal.SIGUSR1)
    process.wait(120)


def wait_for_moment(run: Run, moment: str, draw: random.Random, start_seconds: float) -> None:
    """Wait for a random moment of the kind `moment` (one of MOMENTS)."""
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
    """Start an attempt, kill one of its ranks, and wait until all its processes have ended; returns the kill time."""
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
        result.killed_at += " (already ended)"
    launcher.wait(300)
    wait_for(lambda: not run.processes(), 300, "the end of all processes")
    result.end_seconds = time.monotonic() - killed
    return died


def check(run: Run, result: Result, expected: list[tuple], steps: int) -> None:
    """Append every difference from the undisturbed run, whose losses are `expected`, to result.faults."""
    if run.losses() != expected:
        result.faults.append("losses differ")
    if [line["batch"] for line, _ in read_lines(run.run)] != list(range(steps)):
        result.faults.append("not every batch is present exactly once")
    for attempt in {line["attempt"] for line in _all_lines(run)}:
        batches = [line["batch"] for line in _all_lines(run) if line["attempt"] == attempt]
        if batches != list(range(batches[0], batches[0] + len(batches))):
            result.faults.append(f"batches of attempt {attempt} are out of order")
    for folder in list_checkpoints(run.run):
        result.faults += [f"{folder.name}: {damage}" for damage in find_damage(folder, threads=1)]
    if run.processes():
        result.faults.append(f"processes are still running: {sorted(run.processes())}")
    if result.end_seconds > LONGEST_END:
        result.faults.append(f"the attempt ended {result.end_seconds:.0f} s after the kill")


def _all_lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]


def run_once(
    folder: Path, number: int, options: argparse.Namespace, expected: list[tuple], start_seconds: float
) -> Result:
    """Execute one disturbed run and check it."""
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
    check(run, result, expected, options.steps)
    if not result.faults and not options.keep:
        shutil.rmtree(run.run)
    return result


def prepare(folder: Path) -> None:
    """Write the shards and the configuration of all runs."""
    from tests.data.corpora import make_pairs, make_vocabulary, write_shards

    write_shards(folder / "shards", make_pairs(200, make_vocabulary()), make_vocabulary())
    (folder / "config.yaml").write_text(CONFIG)


def show(results: list[Result]) -> None:
    """Print the table, one line per kind of moment, and the faults."""
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
                        for name in ("breakdown", "simulated"))  # fmt: skip
    print(f"goodput according to the run folders {found:.1%}, simulated {simulated:.1%}, ratio {simulated / found:.3f}")
    for each in results:
        for fault in each.faults:
            print(f"run {each.number}, rank {each.rank} killed in {each.moment} ({each.killed_at}): {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="number of disturbed runs (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and ranks (default 0)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks per run (default 2)")
    parser.add_argument("--steps", type=int, default=40, help="steps per run, with 8 checkpoints (default 40)")
    parser.add_argument("--json", type=Path, help="file for the results of every run")
    parser.add_argument("--keep", type=Path, help="folder to keep the runs in (default: a temporary folder)")
    options = parser.parse_args()
    if options.runs < 1 or options.ranks < 1 or options.steps < 8:
        raise ValueError(
            f"--runs ({options.runs}) and --ranks ({options.ranks}) must be at least 1, --steps ({options.steps}) 8."
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        undisturbed = Run(folder, "undisturbed", options)
        began = time.time()
        undisturbed.finish()
        wall = time.time() - began
        expected, started = undisturbed.losses(), _all_lines(undisturbed)[0]["time"] - began
        kept = sum(line["step_seconds"] for line in read_metrics(undisturbed.run))
        print(f"undisturbed: first step after {started:.1f} s, goodput {kept / wall:.1%} of {wall:.1f} s", flush=True)
        results = []
        for number in range(options.runs):
            result = run_once(folder, number, options, expected, started)
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
