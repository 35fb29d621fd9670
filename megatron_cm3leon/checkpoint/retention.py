"""When a run saves, and which of its checkpoints it keeps."""

import os
import shutil
from pathlib import Path

from megatron_cm3leon.checkpoint.format import list_checkpoints, list_unfinished, step_of
from megatron_cm3leon.config.schema import CheckpointConfig, Config

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
