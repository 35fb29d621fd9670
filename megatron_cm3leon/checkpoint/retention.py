"""Schedule of checkpoints and retention: when a run saves, and which checkpoints it keeps."""

import os
import shutil
from pathlib import Path

from megatron_cm3leon.checkpoint.format import list_checkpoints, list_unfinished, parse_step
from megatron_cm3leon.config.schema import CheckpointConfig, Config

LOG_SPACED_STEPS = (0, *(2**power for power in range(10)))
"""0, 1, 2, 4 ... 512: early training changes the model most (Pythia, arXiv 2304.01373)."""

STEPS_AHEAD = 20
"""Steps before a save at which its memory is allocated: page-locking 44 GB takes 10-20 s and slows down the steps."""


def is_due(step: int, options: CheckpointConfig) -> bool:
    """Whether a run saves after `step` optimizer steps."""
    return (options.log_spaced and step in LOG_SPACED_STEPS) or (step > 0 and step % options.interval == 0)


def saves_soon(step: int, config: Config) -> bool:
    """Whether a run that has taken `step` steps saves within the next STEPS_AHEAD."""
    end = min(config.train.steps, config.train.stop_after or config.train.steps)
    return any(each == end or is_due(each, config.checkpoint) for each in range(step + 1, step + STEPS_AHEAD + 1))


def explain_retention(step: int, newer: int, options: CheckpointConfig) -> str:
    """Rule that keeps the checkpoint of `step`, which has `newer` newer ones; empty when it is to be deleted."""
    if options.log_spaced and step in LOG_SPACED_STEPS:
        return "log_spaced"
    if options.keep_every and step % options.keep_every == 0:
        return f"keep_every {options.keep_every}"
    if not options.keep_last or newer < options.keep_last:
        return f"keep_last {options.keep_last}" if options.keep_last else "keep_last 0 (all)"
    return ""


def remove_old_checkpoints(run: str | Path, options: CheckpointConfig) -> None:
    """Delete checkpoints that no rule keeps, and incomplete ones; call it only while no save is in progress.

    Deletes only folders with the name of a checkpoint (step-00001000, or with .tmp or .old), and no symbolic links.
    """
    folders = list_checkpoints(run)
    for newer, folder in enumerate(reversed(folders)):
        if not folder.is_symlink() and not explain_retention(parse_step(folder), newer, options):
            os.replace(
                folder, folder.with_name(folder.name + ".old")
            )  # a half-deleted folder must not count as a checkpoint
    for folder in list_unfinished(run, (".tmp", ".old")):
        if not folder.is_symlink():
            shutil.rmtree(folder)
