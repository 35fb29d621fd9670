"""Checkpoints in words, for tools/checkpoint.py: from manifests and headers alone, without torch."""

import time
from dataclasses import asdict
from math import prod
from pathlib import Path

import yaml

from megatron_cm3leon.checkpoint.format import (
    MANIFEST,
    CheckpointFolder,
    list_checkpoints,
    list_unfinished,
    step_of,
)
from megatron_cm3leon.checkpoint.retention import reason_kept
from megatron_cm3leon.config.loading import Config, load_config


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint folder itself, or those of a run folder, oldest first; ValueError for anything else."""
    if not path.is_dir():
        raise ValueError(
            f"there is no folder {path}; give a checkpoint (RUN/checkpoints/step-00001000) or a run folder."
        )
    if (path / MANIFEST).is_file() or step_of(path.absolute()) is not None:
        return [path]
    found = list_checkpoints(path)
    if not found:
        raise ValueError(
            f"{path} is neither a checkpoint nor a run with checkpoints; give a folder such as "
            f"RUN/checkpoints/step-00001000, or RUN."
        )
    return found


def describe_run(run: Path) -> str:
    """A table of the run's checkpoints, oldest first, those never finished at the end."""
    folders = find_checkpoints(run)
    if folders == [run]:
        raise ValueError(f"{run} is a checkpoint, not a run; use inspect, or give the run folder ({run.parents[1]}).")
    options = _run_config(run).checkpoint
    rows = [("step", "tokens", "written", "bytes", "complete", "kept by")]
    for newer, folder in enumerate(reversed(folders)):
        step = step_of(folder)
        why = reason_kept(step, newer, options) or "nothing: goes after the next save"
        try:
            opened = CheckpointFolder(folder)
            rows.insert(1, (str(step), f"{opened.state.tokens:,}", _written(folder), f"{opened.bytes:,}", "yes", why))
        except ValueError as error:
            rows.insert(1, (str(step), "", "", f"{_bytes_on_disk(folder):,}", f"NO: {_first_sentence(error)}", why))
    for folder in list_unfinished(run):
        rows.append(
            (
                str(step_of(folder.with_suffix(""))),
                "",
                "",
                f"{_bytes_on_disk(folder):,}",
                "NO: being written, or left",
                "",
            )
        )
    return _table(rows, right=(0, 1, 3))


def _run_config(run: Path) -> Config:
    path = run / "config.yaml"
    return load_config(path, expand=False) if path.is_file() else Config()


def _first_sentence(error: ValueError) -> str:
    """What is wrong, without the folder, which the row names."""
    text = str(error).split(". ")[0].rstrip(".")
    return text.split("is damaged: ")[-1] if "is damaged: " in text else f"no {MANIFEST}"


def _written(folder: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / MANIFEST).stat().st_mtime))


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def describe_checkpoint(folder: Path) -> str:
    """Everything a checkpoint says of itself; ValueError when it is damaged. Only its small files are hashed."""
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
            f"{files} files, {checkpoint.bytes:,} bytes, sizes right (verify compares the SHA-256 of the numbers)",
            f"written {_written(folder)}",
        ],
        "versions": [f"{name} {version}" for name, version in checkpoint.manifest["versions"].items()],
        "layout that wrote it": [f"{name} {value}" for name, value in layout.items()],
        "state": [
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in state.items()
        ],
        f"vocabulary {vocabulary.hash}": [
            *(f"[{start:,}, {stop:,}) {name}" for name, start, stop in ranges),
            f"{vocabulary.image_height} x {vocabulary.image_width} codes a picture, {vocabulary.sentinels} sentinels",
        ],
        "configuration": yaml.safe_dump(asdict(config), sort_keys=False).splitlines(),
        "tensors": _tensors(checkpoint),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _tensors(checkpoint: CheckpointFolder) -> list[str]:
    rows, numbers = [("name", "shape", "kinds", "pieces", "of ranks")], 0
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        stored = checkpoint.find(name, "weight")
        kinds = [kind for named, kind in checkpoint.pieces if named == name]
        ranks = sorted({int(each.file.removeprefix("rank-").split(".")[0]) for each in stored})
        numbers += prod(shape)
        rows.append((name, " x ".join(map(str, shape)), " ".join(kinds), str(len(stored)), _ranges(ranks)))
    missing = checkpoint.missing_numbers()
    return [
        *_table(rows, right=(3,)).splitlines(),
        f"{len(checkpoint.names)} tensors, {numbers:,} parameters" + (f"; {missing}" if missing else ""),
    ]


def _ranges(numbers: list[int]) -> str:
    """0-3, 8: sorted numbers with runs put together."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _table(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
