"""Verification of all files of a checkpoint on command, without torch; verify.py does so during loading."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_cm3leon.checkpoint.format import CheckpointFolder, find_content_damage, read_manifest, suggest_previous


def find_damage(folder: Path, report: Callable[[int], None] = lambda size: None, threads: int = 0) -> list[str]:
    """Every problem of a checkpoint, one sentence each; `report` is called with the bytes read, from any thread.

    `threads` files are read at once; 0 uses every core.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        files = manifest["files"].items()
        checks = pool.map(lambda file: find_content_damage(folder, file[0], file[1], report), files)
        problems = [problem for problem in checks if problem]
    if not problems:
        try:
            missing = CheckpointFolder(folder).find_missing_numbers()
        except ValueError as error:
            return [str(error)]
        problems = [missing] if missing else []
    sentences = [f"checkpoint {folder} is damaged: {problem}." for problem in problems]
    return [*sentences[:-1], sentences[-1] + suggest_previous(folder)] if sentences else []
