"""Saving of a run in progress: when it is due, in the background, with old checkpoints deleted afterwards."""

import time
from contextlib import suppress
from pathlib import Path

from megatron_cm3leon.checkpoint.format import count_bytes, step_folder
from megatron_cm3leon.checkpoint.retention import is_due, remove_old_checkpoints
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.schema import Config
from megatron_cm3leon.engine.base import Engine
from megatron_cm3leon.monitoring import events

PAUSE_SECONDS = 0.01
"""Between two polls of the save that a new one waits for."""


class RunSaver:
    """Saves a run when it is due, and deletes old checkpoints once a newer one is complete."""

    def __init__(self, engine: Engine, config: Config, first: bool, saved: int | None) -> None:
        """`first`: this rank deletes old checkpoints; `saved`: the step that is already on disk, or None."""
        self.engine, self.config, self.first, self.saved = engine, config, first, saved
        self.in_progress = False
        self.started, self.attempt = 0.0, 0

    def save_if_due(self, state: TrainState) -> None:
        """Start a save when one is due (checkpoint.interval and log_spaced); collective."""
        if is_due(state.step, self.config.checkpoint):
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Start a save unless this step is saved already; collective."""
        if state.step != self.saved:
            self.wait()  # engine.save() would wait too, but then the event of that checkpoint would not be recorded
            self.started, self.attempt = time.monotonic(), state.attempt
            self.engine.save(step_folder(Path(self.config.output), state.step), state)
            self.saved, self.in_progress = state.step, True
            self.poll()  # a synchronous save is complete now

    def __enter__(self) -> "RunSaver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """After an error that all ranks have in common, a save in progress is still completed."""
        if isinstance(error, ValueError):
            with suppress(ValueError):  # the first error is the one that is reported
                self.engine.close()

    def poll(self) -> None:
        """Raise the error of the save in progress, if it failed; once it is complete, delete old checkpoints."""
        if self.in_progress and self.engine.poll():
            self._complete()

    def wait(self) -> None:
        """Wait until this rank's part of the save in progress is on disk (rank 0: until the checkpoint is complete)."""
        while self.in_progress:
            self.poll()
            time.sleep(PAUSE_SECONDS if self.in_progress else 0)

    def finish(self, state: TrainState) -> None:
        """Save the last step, wait until it is on disk and close the engine."""
        self.save(state)
        self.engine.close()
        if self.in_progress:
            self._complete()

    def _complete(self) -> None:
        """Record the complete checkpoint, and delete those that are no longer kept."""
        self.in_progress = False
        if self.first and self.saved is not None:
            folder = step_folder(Path(self.config.output), self.saved)
            seconds = time.monotonic() - self.started
            values = {"checkpoint": folder.name, "seconds": round(seconds, 3), "bytes": count_bytes(folder)}
            events.record(self.config.output, self.attempt, "saved", step=self.saved, **values)
            remove_old_checkpoints(self.config.output, self.config.checkpoint)
