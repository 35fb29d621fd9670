"""Lines of evidence.py's results: one JSON object per finished unit, with the values of each item.

The first line holds the settings, versions and hashes that all lines share; results of other settings are refused.
Values of items are stored as base64: booleans as bits, numbers as 16-bit multiples of a step of 1/65,535 of the largest
one, so that a line of 2,000 items has a few kilobytes and the interval of any difference can be computed again from the
file alone. Sets of images have their distance for the same resamples of the items in every arm instead.
"""

import base64
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from claims.plan import Unit

from megatron_cm3leon.common.jsonl import drop_truncated_line, parse_lines

LEVELS = 65_535
KEY = ("study", "arm", "family", "size", "seed")
"""Fields that identify a line."""


def pack_values(values: np.ndarray) -> dict:
    """Values of items as JSON: bool [n], or numbers >= 0 [n]."""
    if values.dtype == bool:
        return {"n": len(values), "bits": base64.b64encode(np.packbits(values).tobytes()).decode()}
    assert (values >= 0).all(), "numbers below 0 cannot be packed"
    largest = float(f"{max(float(values.max()), 1e-9):.6g}")
    levels = np.round(values / largest * LEVELS).clip(0, LEVELS).astype("<u2")
    return {"n": len(values), "largest": largest, "levels": base64.b64encode(levels.tobytes()).decode()}


def unpack_values(packed: dict) -> np.ndarray:
    """float64 [n] of what `pack_values` returned."""
    if "bits" in packed:
        bits = np.frombuffer(base64.b64decode(packed["bits"]), np.uint8)
        return np.unpackbits(bits, count=packed["n"]).astype(np.float64)
    levels = np.frombuffer(base64.b64decode(packed["levels"]), "<u2")
    return levels.astype(np.float64) * packed["largest"] / LEVELS


class Results:
    """The lines of a file by the key of their unit, and the file to append to, which several processes may do."""

    def __init__(self, path: Path, shared: dict | None = None) -> None:
        """Read the file. With `shared` (settings, versions, hashes) it can be appended to.

        ValueError if its settings or hashes are others.
        """
        self.path, self.shared = path, {}
        self.lines: dict[tuple, dict] = {}
        """Finished units."""
        if shared is not None:
            shared = json.loads(json.dumps(shared))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(shared, only_first=True)
        self.read()
        if shared is None:
            return
        for kind in ("settings", "hashes"):
            expected, found = shared[kind], self.shared[kind]
            if changed := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
                raise ValueError(
                    f"{path} has results of another {changed[0]} ({found.get(changed[0])}, now "
                    f"{expected.get(changed[0])}); give another --results, or the folder they were measured in as "
                    f"--work."
                )

    def read(self) -> None:
        """Read what is in the file now, also what other processes finished."""
        lines = list(parse_lines(self.path))
        if not lines:
            raise ValueError(f"{self.path} is empty; the stages train and measure write results to it.")
        self.shared = lines[0]
        self.lines = {tuple(line[name] for name in KEY): line for line in lines[1:]}

    def add(self, unit: Unit, seconds: float, content: dict) -> None:
        """Append the line of a finished unit."""
        line = dict(zip(KEY, unit.key, strict=True)) | {"seconds": round(seconds, 1), **content}
        line["finished"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self._append(line)
        self.lines[unit.key] = line

    def _append(self, line: dict, only_first: bool = False) -> None:
        """Write a line at the end, whole or not at all; with `only_first` to an empty file alone."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            drop_truncated_line(file)
            if os.lseek(file, 0, os.SEEK_END) and only_first:
                return
            os.write(file, (json.dumps(line, ensure_ascii=False) + "\n").encode())
            os.fsync(file)
        finally:
            os.close(file)


@contextmanager
def lock_unit(folder: Path, unit: Unit) -> Iterator[bool]:
    """Whether the unit is this process's inside the `with`; the lock of a killed process is released."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{unit.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def load_parts(folder: Path) -> dict[str, np.ndarray]:
    """Arrays of a unit's finished parts, joined along the items."""
    parts = [np.load(path) for path in sorted(folder.glob("part-*.npz"))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}


def save_part(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of a part: the file is complete, or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)
