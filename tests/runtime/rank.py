"""The training command with accidents: `python rank.py ACCIDENTS.json config.yaml ...`.

ACCIDENTS.json: {"pace": seconds by which each step is delayed, "watchdog": cluster.watchdog_seconds once steps begin
(start-up takes long on a busy machine), "accidents": [{"rank", "step", "where", "do"}]}. On that rank, in step `step`
(from 1), at `where` (loader, step, validation or save; the loader is still in the previous step), `do` happens: sleep,
pause (for a moment, and write the file `paused`), stop (SIGSTOP), kill (SIGKILL), raise (an error in the model), value
(a ValueError), memory (CUDA out of memory).
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


def happen(what: str) -> None:
    if what == "sleep":
        time.sleep(600)
    elif what == "pause":
        Path(sys.argv[1]).with_name("paused").touch()
        time.sleep(1.5)
    elif what in ("stop", "kill"):
        os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)
    elif what == "raise":
        raise KeyError("an error of the model")
    elif what == "value":
        raise ValueError("only this rank's shard is unreadable")
    elif what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    else:
        raise AssertionError(what)


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    rank, at = int(os.environ.get("RANK", 0)), {"step": 0}

    def accident(where: str) -> None:
        for each in plan["accidents"]:
            if (each["rank"], each["step"], each["where"]) == (rank, at["step"], where):
                happen(each["do"])

    def before(kind: type, name: str, where: str) -> None:
        original = getattr(kind, name)

        def replaced(self, *arguments, **options):
            if where == "step":
                at["step"] = arguments[1] + 1
                time.sleep(plan["pace"])
            accident(where)
            return original(self, *arguments, **options)

        setattr(kind, name, replaced)

    start_steps = Attempt.start_steps

    def start_watching(self) -> None:
        self.watch.seconds = plan["watchdog"]
        start_steps(self)

    Attempt.start_steps = start_watching
    before(Loader, "__next__", "loader")
    before(Validation, "run", "validation")
    before(RunSaver, "save", "save")
    find = setup.engine_class

    def engine_class(config):
        kind = find(config)
        before(kind, "train_step", "step")
        return kind

    setup.engine_class = engine_class
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
