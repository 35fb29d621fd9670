"""When a run saves, and which of its checkpoints it keeps."""

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cm3leon.checkpoint.format import (
    count_bytes,
    step_folder,
)
from megatron_cm3leon.checkpoint.retention import is_due, remove_old_checkpoints
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.schema import Config
from megatron_cm3leon.monitoring import events

if TYPE_CHECKING:
    from megatron_cm3leon.engine.base import Engine

PAUSE_SECONDS = 0.01
"""Between two looks at the save that a new one waits for."""


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
            values = {"checkpoint": folder.name, "seconds": round(seconds, 3), "bytes": count_bytes(folder)}
            events.record(self.config.output, self.attempt, "saved", step=self.saved, **values)
            remove_old_checkpoints(self.config.output, self.config.checkpoint)
