"""Runs training rows one after the other in a worker process; if a row ends the process, the next row gets a new one.

Run as a program, this module is the worker: it reads cases as JSON lines from standard input (see
tests/distributed/worker.py) and prints DONE after each case whose steps it has written.
"""

import gc
import json
import os
import select
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from tests.distributed.launch import ROOT, child_environment

ROW_SECONDS = 150
"""Time limit of one row, including the imports of a new process."""
DONE = "DONE"


class RowRunner:
    """Runs rows in the order of `submit`, concurrently with this process; `close` ends the worker."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.variables = folder, variables
        self.worker: subprocess.Popen | None = None
        self.log = folder / f"rows-{id(self)}.log"
        self.thread = ThreadPoolExecutor(1)

    def submit(self, case: dict, after: Future | None = None) -> Future:
        """Future of the steps of `case`; `after`: a row of another runner that must end first."""
        return self.thread.submit(self._run, case, after)

    def _run(self, case: dict, after: Future | None) -> list[dict]:
        if after:
            after.result()
        if self.worker is None:
            with open(self.log, "ab") as log:
                self.worker = subprocess.Popen(
                    [sys.executable, "-m", "tests.gpu.rows", str(self.folder)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, text=True,
                    env=child_environment(**self.variables),
                )  # fmt: skip
        self.worker.stdin.write(json.dumps(case) + "\n")
        self.worker.stdin.flush()
        if not self._wait():
            self._end()
            raise AssertionError(f"{case['name']} ended its process:\n{self.log.read_text(errors='replace')[-3000:]}")
        return json.loads((self.folder / f"{case['name']}.json").read_text())

    def _wait(self) -> bool:
        """Whether the worker reported the row as done."""
        deadline, output = time.monotonic() + ROW_SECONDS, ""
        while (remaining := deadline - time.monotonic()) > 0:
            if not select.select([self.worker.stdout], [], [], remaining)[0]:
                return False
            part = os.read(self.worker.stdout.fileno(), 1 << 16).decode(errors="replace")
            output += part
            if not part or DONE in output:
                return DONE in output
        return False

    def _end(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
        self._end()


def main() -> None:
    from megatron_cm3leon.distributed.launch import Rank, set_threads
    from tests.distributed.worker import run_case

    rank = Rank.from_environment()
    set_threads(1, rank)
    for line in sys.stdin:
        run_case(json.loads(line), rank, Path(sys.argv[1]))
        destroy_layout()
        print(DONE, flush=True)


def destroy_layout() -> None:
    """Destroy the groups of a row, and the engine that reference cycles keep: the next row makes its own."""
    from megatron.core import parallel_state

    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        dist.destroy_process_group(group)
    gc.collect()


if __name__ == "__main__":
    main()
