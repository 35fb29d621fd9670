"""Human-readable checkpoint summaries for tools/checkpoint.py, from manifests and headers only, without torch."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path

import yaml

from megatron_cm3leon.checkpoint.format import (
    MANIFEST,
    CheckpointFolder,
    has_step_name,
    list_checkpoints,
    list_unfinished,
    parse_step,
)
from megatron_cm3leon.checkpoint.retention import explain_retention
from megatron_cm3leon.config.loading import Config, load_config


def find_checkpoints(path: Path) -> list[Path]:
    """Return [path] for a checkpoint folder, or the checkpoints of a run folder, oldest first; else ValueError."""
    if not path.is_dir():
        raise ValueError(
            f"folder {path} does not exist; give a checkpoint (RUN/checkpoints/step-00001000) or a run folder."
        )
    if (path / MANIFEST).is_file() or has_step_name(path.absolute()):
        return [path]
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise ValueError(
            f"{path} is neither a checkpoint nor a run with checkpoints; give a folder such as "
            f"RUN/checkpoints/step-00001000, or RUN."
        )
    return checkpoints


def describe_run(run: Path) -> str:
    """Table of the checkpoints of a run, oldest first, followed by the incomplete ones."""
    folders = find_checkpoints(run)
    if folders == [run]:
        raise ValueError(f"{run} is a checkpoint, not a run; use inspect, or give the run folder ({run.parents[1]}).")
    options = _load_run_config(run).checkpoint
    rows = [("step", "tokens", "written", "bytes", "complete", "kept by")]
    for newer, folder in enumerate(reversed(folders)):
        step = parse_step(folder)
        rule = explain_retention(step, newer, options) or "nothing: deleted after the next save"
        try:
            opened = CheckpointFolder(folder)
            tokens, time_written = f"{opened.state.tokens:,}", _format_time_written(folder)
            rows.insert(1, (str(step), tokens, time_written, f"{opened.bytes:,}", "yes", rule))
        except ValueError as error:
            size = f"{_count_bytes_on_disk(folder):,}"
            rows.insert(1, (str(step), "", "", size, f"NO: {_extract_problem(error)}", rule))
    for folder in list_unfinished(run):
        step, size = parse_step(folder.with_suffix("")), f"{_count_bytes_on_disk(folder):,}"
        rows.append((str(step), "", "", size, "NO: being written, or interrupted", ""))
    return _format_table(rows, right=(0, 1, 3))


def _load_run_config(run: Path) -> Config:
    path = run / "config.yaml"
    return load_config(path, expand=False) if path.is_file() else Config()


def _extract_problem(error: ValueError) -> str:
    """The problem in an error's first sentence, without the folder, which the row already names."""
    text = str(error).split(". ")[0].rstrip(".")
    return text.split("is damaged: ")[-1] if "is damaged: " in text else f"no {MANIFEST}"


def _format_time_written(folder: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / MANIFEST).stat().st_mtime))


def _count_bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def describe_checkpoint(folder: Path) -> str:
    """All metadata of a checkpoint; raises ValueError when it is damaged. Only its small files are hashed."""
    checkpoint = CheckpointFolder(folder)
    vocabulary, config = checkpoint.vocabulary, checkpoint.config
    files = len(checkpoint.manifest["files"])
    layout = {"ranks": len(checkpoint.rank_files), **asdict(config.parallel)}
    ranges = [
        ("text pieces", 0, vocabulary.image_start),
        ("image codes", vocabulary.image_start, vocabulary.image_end),
        ("specials", vocabulary.image_end, vocabulary.size),
    ]
    state = checkpoint.state.to_dict()
    sections = {
        "checkpoint": [
            f"{folder}",
            f"{files} files, {checkpoint.bytes:,} bytes, sizes correct (use verify to compare every SHA-256)",
            f"written {_format_time_written(folder)}",
        ],
        "versions": [f"{name} {version}" for name, version in checkpoint.manifest["versions"].items()],
        "layout of the run that wrote it": [f"{name} {value}" for name, value in layout.items()],
        "state": [
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in state.items()
        ],
        f"vocabulary {vocabulary.hash}": [
            *(f"[{start:,}, {stop:,}) {name}" for name, start, stop in ranges),
            f"{vocabulary.image_height} x {vocabulary.image_width} codes per image, {vocabulary.sentinels} sentinels",
        ],
        "configuration": yaml.safe_dump(asdict(config), sort_keys=False).splitlines(),
        "tensors": _describe_tensors(checkpoint),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _describe_tensors(checkpoint: CheckpointFolder) -> list[str]:
    rows, parameters = [("name", "shape", "kinds", "pieces", "ranks")], 0
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        stored = checkpoint.find(name, "weight")
        kinds = [kind for stored_name, kind in checkpoint.pieces if stored_name == name]
        ranks = sorted({int(each.file.removeprefix("rank-").split(".")[0]) for each in stored})
        parameters += prod(shape)
        rows.append((name, " x ".join(map(str, shape)), " ".join(kinds), str(len(stored)), _format_ranges(ranks)))
    problem = checkpoint.find_missing_numbers()
    return [
        *_format_table(rows, right=(3,)).splitlines(),
        f"{len(checkpoint.names)} tensors, {parameters:,} parameters" + (f"; {problem}" if problem else ""),
    ]


def _format_ranges(numbers: list[int]) -> str:
    """Sorted numbers with consecutive ones merged: 0-3, 8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _format_table(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    """Rows in aligned columns; the columns `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
