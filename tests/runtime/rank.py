"""The training command with injected faults: `python rank.py FAULTS.json config.yaml ...`.

FAULTS.json: {"pace": seconds by which each step is delayed, "watchdog": cluster.watchdog_seconds once steps begin
(start-up takes long on a busy machine), "faults": [{"rank", "step", "where", "action"}]}. On that rank, in step `step`
(from 1), at `where` (loader, step, validation or save; the loader is still in the previous step), the fault is: sleep
(for 600 s, after writing the file `sleeping-RANK`), pause (for 1.5 s, after writing the file `paused`), stop (SIGSTOP),
kill (SIGKILL), raise (an error in the model), value (a ValueError), memory (CUDA out of memory).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from megatron_cm3leon import train
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.runtime.attempt import Attempt
from megatron_cm3leon.training import setup
from megatron_cm3leon.training.saving import RunSaver
from megatron_cm3leon.training.validation import Validation


def cause_fault(action: str) -> None:
    if action == "sleep":
        Path(sys.argv[1]).with_name(f"sleeping-{os.environ['RANK']}").touch()
        time.sleep(600)
    elif action == "pause":
        Path(sys.argv[1]).with_name("paused").touch()
        time.sleep(1.5)
    elif action in ("stop", "kill"):
        os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
    elif action == "raise":
        raise KeyError("an error of the model")
    elif action == "value":
        raise ValueError("only this rank's shard is unreadable")
    elif action == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    else:
        raise AssertionError(action)


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    rank, current = int(os.environ.get("RANK", 0)), {"step": 0}

    def inject_faults(where: str) -> None:
        for each in plan["faults"]:
            if (each["rank"], each["step"], each["where"]) == (rank, current["step"], where):
                cause_fault(each["action"])

    def inject_before(kind: type, name: str, where: str) -> None:
        original = getattr(kind, name)

        def replaced(self, *arguments, **options):
            if where == "step":
                current["step"] = arguments[1] + 1
                time.sleep(plan["pace"])
            inject_faults(where)
            return original(self, *arguments, **options)

        setattr(kind, name, replaced)

    start_steps = Attempt.start_steps

    def start_watching(self) -> None:
        self.watch.seconds = plan["watchdog"]
        start_steps(self)

    Attempt.start_steps = start_watching
    inject_before(Loader, "__next__", "loader")
    inject_before(Validation, "run", "validation")
    inject_before(RunSaver, "save", "save")
    find = setup.engine_class

    def engine_class(config):
        kind = find(config)
        inject_before(kind, "train_step", "step")
        return kind

    setup.engine_class = engine_class
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
