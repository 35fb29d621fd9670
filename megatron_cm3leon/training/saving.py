"""When a run saves, and which of its checkpoints it keeps."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cm3leon.checkpoint.format import (
    list_checkpoints,
    list_unfinished,
    step_folder,
    step_of,
    total_bytes,
)
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.schema import CheckpointConfig, Config
from megatron_cm3leon.monitoring import events

if TYPE_CHECKING:
    from megatron_cm3leon.engine.base import Engine

PAUSE_SECONDS = 0.01
"""Between two looks at the save that a new one waits for."""
LOG_SPACED_STEPS = (0, *(2**power for power in range(10)))
"""0, 1, 2, 4 ... 512: where the early changes are (Pythia, arXiv 2304.01373)."""
STEPS_AHEAD = 20
"""Steps before a save at which its memory is made ready: page-locking 44 GB takes 10-20 s, and slows steps down."""


def is_due(step: int, options: CheckpointConfig) -> bool:
    """Whether a run saves after `step` optimizer steps."""
    return (options.log_spaced and step in LOG_SPACED_STEPS) or (step > 0 and step % options.interval == 0)


def saves_soon(step: int, config: Config) -> bool:
    """Whether a run that has taken `step` steps saves within the next STEPS_AHEAD."""
    end = min(config.train.steps, config.train.stop_after or config.train.steps)
    return any(each == end or is_due(each, config.checkpoint) for each in range(step + 1, step + STEPS_AHEAD + 1))


def reason_kept(step: int, newer: int, options: CheckpointConfig) -> str:
    """Why the checkpoint of `step`, which has `newer` newer ones, stays; empty when it goes."""
    if options.log_spaced and step in LOG_SPACED_STEPS:
        return "log_spaced"
    if options.keep_every and step % options.keep_every == 0:
        return f"keep_every {options.keep_every}"
    if not options.keep_last or newer < options.keep_last:
        return f"keep_last {options.keep_last}" if options.keep_last else "keep_last 0 (all)"
    return ""


def remove_old(run: str | Path, options: CheckpointConfig) -> None:
    """Delete what no rule keeps and what was left unfinished; only while no save is under way.

    Nothing goes but folders with a checkpoint's own name (step-00001000, with .tmp or .old), and no links.
    """
    folders = list_checkpoints(run)
    for newer, folder in enumerate(reversed(folders)):
        if not folder.is_symlink() and not reason_kept(step_of(folder), newer, options):
            os.replace(folder, folder.with_name(folder.name + ".old"))  # half deleted, it is no checkpoint any more
    for folder in list_unfinished(run, (".tmp", ".old")):
        if not folder.is_symlink():
            shutil.rmtree(folder)


class RunSaver:
    """Saves a run when it is due; what is old goes once a newer checkpoint is whole."""

    def __init__(self, engine: "Engine", config: Config, first: bool, saved: int | None) -> None:
        """`first`: this rank deletes; `saved`: the step that is on disk already, or None."""
        self.engine, self.config, self.first, self.saved = engine, config, first, saved
        self.under_way = False
        self.begun, self.attempt = 0.0, 0

    def save_if_due(self, state: TrainState) -> None:
        """Start a save when the schedule asks for one; collective."""
        if is_due(state.step, self.config.checkpoint):
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Start a save unless this step has one; collective."""
        if state.step != self.saved:
            self.wait()  # engine.save() would wait as well, and its folder would go unrecorded
            self.begun, self.attempt = time.monotonic(), state.attempt
            self.engine.save(step_folder(Path(self.config.output), state.step), state)
            self.saved, self.under_way = state.step, True
            self.poll()  # a synchronous save is done

    def __enter__(self) -> "RunSaver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """After an error that every rank met, the save under way still gets onto the disk."""
        if isinstance(error, ValueError):
            with suppress(ValueError):  # the first error is the one to tell
                self.engine.close()

    def poll(self) -> None:
        """Raise what went wrong in the save under way; once it is whole, delete what is old."""
        if self.under_way and self.engine.poll():
            self._tidy()

    def wait(self) -> None:
        """Return once this rank's part of the save under way is on disk (rank 0: the checkpoint is whole)."""
        while self.under_way:
            self.poll()
            time.sleep(PAUSE_SECONDS if self.under_way else 0)

    def finish(self, state: TrainState) -> Path:
        """Save the last step, wait until it is on disk and end the engine; returns the checkpoint's folder."""
        self.save(state)
        self.engine.close()
        if self.under_way:
            self._tidy()
        return step_folder(Path(self.config.output), state.step)

    def _tidy(self) -> None:
        """Record what is whole now, and delete what it makes superfluous."""
        self.under_way = False
        if self.first:
            folder = step_folder(Path(self.config.output), self.saved)
            seconds = time.monotonic() - self.begun
            values = {"checkpoint": folder.name, "seconds": round(seconds, 3), "bytes": total_bytes(folder)}
            events.record(self.config.output, self.attempt, "saved", step=self.saved, **values)
            remove_old(self.config.output, self.config.checkpoint)
