"""The result of an evaluation task: figures with their intervals, and everything that a comparison needs.

A task of tools/evaluate.py writes to its output folder:

    TASK.json     the result: figures, settings, seed, SHA-256 of the inputs, versions
    items.jsonl   one line per finished item, from which an interrupted task continues; of a launch with several ranks
                  each other rank writes items-RANK.jsonl
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.atomic_io import sha256_file, write_json
from megatron_cm3leon.common.jsonl import drop_truncated_line, parse_lines

FORMAT = 1
PACKAGES = ("megatron_cm3leon", "torch", "numpy", "pillow")
"""Packages whose versions every result records."""
RESAMPLES = 1000
"""Bootstrap resamples of an interval."""


@dataclass(frozen=True)
class Figure:
    """A measured number, with the 95 % bootstrap interval over the items if there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """Items that the number was computed from."""
    unit: str = ""

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        count = "" if self.n is None else f", n = {self.n}"
        return f"{self.value:.4g}{interval}{f' {self.unit}' if self.unit else ''}{count}"


def bootstrap(
    items: Sequence | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    seed: int = 0,
    unit: str = "",
    resamples: int = RESAMPLES,
) -> Figure:
    """`statistic` of the items, [n] or [n, ...], and its 95 % percentile interval over resampled items.

    ValueError for no items, and for items that are not finite numbers.
    """
    values = np.asarray(items, np.float64)
    if not len(values):
        raise ValueError("there are no items to compute a figure from.")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite numbers.")
    random = np.random.default_rng(seed)
    found = [statistic(values[random.integers(0, len(values), len(values))]) for _ in range(resamples)]
    low, high = np.percentile(found, [2.5, 97.5])
    return Figure(float(statistic(values)), float(low), float(high), len(values), unit)


@dataclass(kw_only=True)
class Result:
    """What a task measured, and on what."""

    task: str
    figures: dict[str, Figure]
    settings: dict
    """Options that change a figure."""
    seed: int = 0
    inputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file or folder that was read: weights, lists, references."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of further packages that the figures depend on; `write` adds those of PACKAGES."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know: metrics that are off and why, truncated captions."""
    tables: dict = field(default_factory=dict)
    """Further results: accuracies by group, examples."""

    def write(self, output: str | Path) -> Path:
        """Write TASK.json to the folder `output`; returns its path."""
        path = Path(output) / f"{self.task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        content["versions"] = read_versions() | self.versions
        write_json(path, {"format": FORMAT, **content})
        return path


def read_result(path: str | Path) -> Result:
    """The result that `write` wrote; ValueError for any other file, and for a damaged or incomplete one.

    Keys that a later version has added are not read.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no result at {path}; tools/evaluate.py TASK writes one.") from error
    except ValueError as error:
        raise ValueError(_describe_damage(path, f"not valid JSON ({error})")) from error
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise ValueError(f"{path} is not a result of tools/evaluate.py: it has no format; give a TASK.json.")
    if content["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {content['format']}; this version reads up to {FORMAT}: read it with a later version."
        )
    for each in fields(Result):
        if each.name in content and type(content[each.name]) is not _KINDS[each.name]:
            raise ValueError(_describe_damage(path, f"{each.name} is {json.dumps(content[each.name])[:60]}"))
        if each.name not in content and each.default is each.default_factory is MISSING:
            raise ValueError(_describe_damage(path, f"{each.name} is missing"))
    content["figures"] = {name: _parse_figure(name, each, path) for name, each in content["figures"].items()}
    return Result(**{each.name: content[each.name] for each in fields(Result) if each.name in content})


_KINDS = {
    "task": str, "figures": dict, "settings": dict, "seed": int, "inputs": dict, "versions": dict, "notes": list,
    "tables": dict,
}  # fmt: skip
"""JSON types of the keys of a result."""


def _parse_figure(name: str, content: object, path: Path) -> Figure:
    """A figure from its JSON object; ValueError for a value that is not a number."""
    known = [each.name for each in fields(Figure)]
    values = {key: value for key, value in content.items() if key in known} if isinstance(content, dict) else {}
    numbers = [values.get("value"), *(values[key] for key in ("low", "high", "n") if values.get(key) is not None)]
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError(_describe_damage(path, f"the figure {name} is {json.dumps(content)[:60]}"))
    return Figure(**values)


def _describe_damage(path: Path, fault: str) -> str:
    return f"{path} is not a result of tools/evaluate.py, or is damaged: {fault}; repeat the command that wrote it."


def read_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the installed ones of `packages`."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hash_input(path: str | Path) -> str:
    """SHA-256 of a file, or of the relative paths and contents of all files of a folder; ValueError if absent."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise ValueError(f"there is no file or folder at {path}.")
    digest = hashlib.sha256()
    for each in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{each.relative_to(path).as_posix()}\0{sha256_file(each)}\n".encode())
    return digest.hexdigest()


class FinishedItems:
    """Items of a task that are finished, in its output folder: an interrupted task continues after them.

    Each rank of a launch (ranks.py) appends to a file of its own, items.jsonl or items-RANK.jsonl. The first rank reads
    all of them, also those of earlier launches with more ranks. The first line of a file holds the task's identity
    (settings, inputs, seed); with another identity the folder is refused.
    """

    def __init__(self, output: str | Path, identity: dict, rank: int = 0, *, former: dict | None = None) -> None:
        """Read what earlier runs finished; ValueError if one of them had another identity.

        `former` is the same identity as an earlier version wrote it.
        """
        self.items: dict[str, dict] = {}
        """Finished items by their key; those of this rank's file on ranks other than the first."""
        # Compared as JSON holds it: tuples become lists.
        self._identity = json.loads(json.dumps(identity))
        self._known = [self._identity, json.loads(json.dumps(former or identity))]
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / _items_name(rank)
        if not rank:
            others = [path for path in sorted(folder.iterdir()) if re.fullmatch(r"items-\d+\.jsonl", path.name)]
            for path in others:
                self._read(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            drop_truncated_line(self._file)
            if not self._read(self.path):
                self._append([{"identity": self._identity}])
        except BaseException:
            self.close()
            raise

    def add(self, key: str, item: dict) -> None:
        """Append an item; it is on the disk, or absent, after a crash."""
        self.add_all({key: item})

    def add_all(self, items: dict[str, dict]) -> None:
        """Append the items of a batch, by key."""
        self._append([{"key": key, "item": item} for key, item in items.items()])
        self.items |= items

    def read_ranks(self, ranks: int) -> None:
        """Read the files of all other ranks of this launch, which have called `sync`."""
        for path in [self.path.parent / _items_name(rank) for rank in range(1, ranks)]:
            if path.exists():
                self._read(path)

    def sync(self) -> None:
        """Return when other nodes can read what this rank has appended."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _read(self, path: Path) -> bool:
        """Add the items of a file; whether it had any line. ValueError if it is of another identity."""
        lines = parse_lines(path)
        before = next(lines, None)
        if before is None:
            return False
        if before.get("identity") not in self._known:
            earlier = before.get("identity") or {}
            changed = sorted(key for key in {*earlier, *self._identity} if earlier.get(key) != self._identity.get(key))
            raise ValueError(
                f"{path} is of a run with different {', '.join(changed)}; give another --output, or delete the file."
            )
        self.items |= {line["key"]: line["item"] for line in lines}
        return True

    def _append(self, lines: list[dict]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        data = memoryview(text.encode())
        os.lseek(self._file, 0, os.SEEK_END)
        while data:
            data = data[os.write(self._file, data) :]


def _items_name(rank: int) -> str:
    return f"items-{rank}.jsonl" if rank else "items.jsonl"
