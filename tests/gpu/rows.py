"""Runs rows of training in a process of their own, one after the other; a row that ends it does not end the others.

As a program, a worker: cases as JSON lines on standard input (see tests/distributed/worker.py), one word on standard
output after each that has written its steps.
"""

import json
import os
import select
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.distributed.launch import ROOT, child_environment

ROW_SECONDS = 150
"""For one row, the imports of a new process included."""
DONE = "DONE"


class RowRunner:
    """Rows in the order of `submit`, beside this process; `close` ends the worker."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.variables = folder, variables
        self.worker: subprocess.Popen | None = None
        self.log = folder / f"rows-{id(self)}.log"
        self.thread = ThreadPoolExecutor(1)

    def submit(self, case: dict, after: Future | None = None) -> Future:
        """The steps of `case`, once they are there; `after`: a row of another runner whose files it needs."""
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
        """Whether the worker said that the row is done."""
        deadline, said = time.monotonic() + ROW_SECONDS, ""
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.worker.stdout], [], [], left)[0]:
                return False
            part = os.read(self.worker.stdout.fileno(), 1 << 16).decode(errors="replace")
            said += part
            if not part or DONE in said:
                return DONE in said
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
        print(DONE, flush=True)


if __name__ == "__main__":
    main()
