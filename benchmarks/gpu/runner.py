"""Run the rows of a driver, each in its own process, and write every row to disk as soon as it is finished.

A driver lists its rows, the most important first: dictionaries with at least `name`, `kind` and `limit_s`, the time
limit in seconds. It also provides what its worker processes use:

    modules        modules that a row imports; a worker imports them while the previous row is measured
    measure(row)   a generator of states of the row, each with all results so far; the last one is the result

With `several`, each state is a separate row. Instead of a result, a row may have:

    failed         it raised an exception, or its process ended: the end of the error, with `out_of_memory` if so
    cut            it exceeded its time limit: the row has the last state
    skipped        too little of `--seconds` was left to start it

The file is JSON Lines: a line that describes the machine, then a line per row, flushed and fsynced. When a driver is
killed, its workers end with it. Only the standard library is required here: the driver itself never opens the device.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARE_TO_START = 0.35
"""Share of a row's time limit; if less time is left, the row is skipped."""
ERROR_CHARACTERS = 2000
ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # for rows that nearly fill the memory
    "NCCL_SOCKET_IFNAME": "lo",  # a node without network access has no other interface
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
PR_SET_PDEATHSIG = 1
MACHINE = "machine"
"""`kind` of the first row."""

Measure = Callable[[dict], Iterator[dict]]


def parse_options(description: str, seconds: float, output: str) -> argparse.Namespace:
    """Parse the options, which are the same for every driver."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"time limit of all rows (default: {seconds:.0f})"
    )
    parser.add_argument("--output", type=Path, default=Path(output), help=f"JSON Lines file to append to ({output})")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="run only rows whose name contains one of these"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to check that it runs"
    )
    parser.add_argument("--list", action="store_true", help="print the rows with their time limits and exit")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_driver(
    script: str,
    options: argparse.Namespace,
    rows: list[dict],
    modules: tuple[str, ...],
    measure: Measure,
    *,
    several: bool = False,
    show: Callable[[dict], str] = json.dumps,
    again: Callable[[dict], dict | None] = lambda result: None,
) -> int:
    """The `main` of a driver, given its options; exit status 0 if all chosen rows were measured, 2 for a usage error.

    `show` returns the line that is printed for a result, `again` the row to try after a failed one, or None.
    """
    if options.worker is not None:
        return serve(options.worker, options.device, modules, measure)
    chosen = [row for row in rows if not options.only or any(text in row["name"] for text in options.only)]
    if not chosen:
        names = ", ".join(row["name"] for row in rows)
        print(f"error: --only ({' '.join(options.only)}) matches no row; the rows are: {names}.", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{row['limit_s']:5.0f} s  {row['name']}" for row in chosen))
        return 0
    with Driver(script, options, several) as driver:
        return driver.run(chosen, show, again)


class Driver:
    """The workers and the output file of one run."""

    def __init__(self, script: str, options: argparse.Namespace, several: bool) -> None:
        self.command, self.several = [sys.executable, script, "--device", options.device], several
        self.seconds, self.started = options.seconds, time.monotonic()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(options.output, "a")  # noqa: SIM115 - closed by __exit__
        self.spare: Worker | None = None

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_) -> None:
        if self.spare:
            self.spare.stop()
        self.file.close()

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def write(self, row: dict) -> dict:
        """Append a row; it is on the disk when this returns."""
        row = _rounded({**row, "at_s": time.monotonic() - self.started})
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        return row

    def run(self, rows: list[dict], show: Callable[[dict], str], again: Callable[[dict], dict | None]) -> int:
        """Measure the rows in order; returns 0 if all were measured, else 1."""
        for machine in self.measure({"name": "machine", "kind": MACHINE, "limit_s": 60}, bool(rows)):
            print(json.dumps(machine), flush=True)
            if "failed" in machine or "cut" in machine:
                return 1
        unmeasured, waiting = [], list(rows)
        while waiting:
            row = waiting.pop(0)
            if self.left < SHARE_TO_START * row["limit_s"]:
                self.write({**_plain(row), "skipped": f"{max(0.0, self.left):.0f} s were left"})
                unmeasured.append(row["name"])
                continue
            for result in self.measure(row, bool(waiting)):
                print(show(result), flush=True)
                other = again(result) if "failed" in result else None
                if other:
                    waiting.insert(0, other)
                elif "failed" in result or "cut" in result:
                    unmeasured.append(row["name"])
        print(f"{len(unmeasured)} rows not measured: {', '.join(unmeasured)}" if unmeasured else "all rows measured")
        return 1 if unmeasured else 0

    def measure(self, row: dict, more: bool) -> Iterator[dict]:
        """Yield the results of `row`, each once it is on the disk; `more`: another row follows."""
        worker, self.spare = self.spare or Worker(self.command), None
        started, limit = time.monotonic(), row["limit_s"]
        if row["kind"] != MACHINE:
            limit = min(limit, self.left)
        state, ending = _plain(row), {"cut": f"time limit of {limit:.0f} s"}
        worker.start(_plain(row))
        self.spare = Worker(self.command) if more else None
        for message in worker.messages(limit):
            if "state" not in message:
                ending = message
            elif self.several and row["kind"] != MACHINE:
                yield self.write(message["state"])
            else:
                state = message["state"]
        worker.stop()
        if ending.pop("done", False):
            if not self.several or row["kind"] == MACHINE:
                yield self.write({**state, "row_s": time.monotonic() - started})
            return
        if ending.get("failed") == "":
            ending["failed"] = f"exit status {worker.process.returncode}\n{worker.end_of_log()}"
        yield self.write({**state, **ending, "row_s": time.monotonic() - started})


class Worker:
    """A process that imports the modules of the rows, then measures the row that it receives."""

    def __init__(self, command: list[str]) -> None:
        self.results, write = os.pipe()
        # Separate caches: a killed compiler leaves an incomplete file, which the next row would load.
        self.caches = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - read once the process has ended
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        caches = {name: f"{self.caches.name}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        self.process = subprocess.Popen(
            [*command, "--worker", str(write)], stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT,
            pass_fds=[write], start_new_session=True, env={**ENVIRONMENT, **os.environ, **caches, "PYTHONPATH": path},
        )  # fmt: skip
        os.close(write)

    def start(self, row: dict) -> None:
        """Send the row to the process."""
        try:
            self.process.stdin.write(json.dumps(row).encode() + b"\n")
            self.process.stdin.close()
        except BrokenPipeError:  # its imports failed: messages() ends at once
            pass

    def messages(self, seconds: float) -> Iterator[dict]:
        """Messages of the process, for at most `seconds`; {"failed": ""} if it ended before its row was complete."""
        deadline, buffer = time.monotonic() + seconds, b""
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.results], [], [], left)[0]:
                return
            part = os.read(self.results, 1 << 16)
            if not part:
                yield {"failed": ""}
                return
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                message = json.loads(line)
                yield message
                if "done" in message or "failed" in message:
                    return

    def stop(self) -> None:
        """Kill the process and all processes that it started."""
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.results)
        self.caches.cleanup()

    def end_of_log(self) -> str:
        """The end of the output of the process."""
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - ERROR_CHARACTERS))
        return self.log.read().decode(errors="replace")


# ------------------------------------------------------------------ in the worker


def serve(results: int, device: str, modules: tuple[str, ...], measure: Measure) -> int:
    """Measure the row that is read from standard input; write every state to the pipe `results` immediately."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the driver, also if it is killed
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
    for name in modules:
        importlib.import_module(name)
    line = sys.stdin.readline()
    if not line:  # the driver has no more rows
        return 0
    row = json.loads(line)

    def send(message: dict) -> None:
        os.write(results, json.dumps(_rounded(message)).encode() + b"\n")

    try:
        for state in describe_machine(device) if row["kind"] == MACHINE else measure(row):
            send({"state": {**_plain(row), **state}})
    except BaseException as error:
        text = traceback.format_exc()[-ERROR_CHARACTERS:]
        send({"failed": text} | ({"out_of_memory": True} if type(error).__name__ == "OutOfMemoryError" else {}))
    else:
        send({"done": True})
    sys.stdout.flush()
    os._exit(0)  # neither a process group nor a lost CUDA context may delay the exit


def describe_machine(device: str) -> Iterator[dict]:
    """The row that describes the machine: the GPU and the versions of the software."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    facts = {"gpu": "CPU", "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("megatron-core", "transformers", "triton", "transformer-engine", "flash-attn", "apex"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    if done.returncode == 0:
        facts["commit"] = done.stdout.strip()
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "--device (cuda) requires a CUDA device, but torch finds none; use --device cpu to check that it runs."
            )
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
        facts |= _query_nvidia_smi()
    yield facts


def _query_nvidia_smi() -> dict[str, str]:
    """Version of the GPU's driver, limits of power and clock; empty without nvidia-smi."""
    names = {"driver": "driver_version", "power_limit": "power.limit", "clock": "clocks.max.sm"}
    query = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def _plain(row: dict) -> dict:
    """A row without the fields that only the driver reads."""
    return {key: value for key, value in row.items() if key != "limit_s"}


def _rounded(value):
    """Floats to 6 significant digits, NaN and infinity as null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
