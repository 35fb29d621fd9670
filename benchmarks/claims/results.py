"""Lines of evidence.py's results: one JSON object per finished unit, with the values of each item.

The first line holds the settings, versions and hashes that all lines share; results of other settings are refused.
Values of items are stored as base64: booleans as bits, numbers as 16-bit multiples of a step of 1/65,535 of the largest
one, so that a line of 2,000 items has a few kilobytes and the interval of any difference can be computed again from the
file alone. Sets of images have their distance for the same resamples of the items in every arm instead.
"""

import base64
import json
import os
import time
from pathlib import Path

import numpy as np
from claims.plan import Unit

from megatron_cm3leon.common.jsonl import drop_truncated_line, parse_lines

LEVELS = 65_535


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
    """The lines of a file by the key of their unit, and the file to append to."""

    def __init__(self, path: Path, shared: dict | None = None) -> None:
        """Read the file. With `shared` (settings, versions, hashes) it can be appended to.

        ValueError if its settings or hashes are others.
        """
        self.path = path
        lines = list(parse_lines(path)) if path.is_file() else []
        self.shared = lines[0] if lines else json.loads(json.dumps(shared or {}))
        self.lines = {_read_key(line): line for line in lines[1:]}
        """Finished units."""
        if shared is None:
            return
        for kind in ("settings", "hashes"):
            expected, found = json.loads(json.dumps(shared[kind])), self.shared[kind]
            if changed := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
                raise ValueError(
                    f"{path} has results of another {changed[0]} ({found.get(changed[0])}, now "
                    f"{expected.get(changed[0])}); give another --results, or the folder they were measured in as "
                    f"--work."
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        if not lines:
            self._append(self.shared)

    def add(self, unit: Unit, seconds: float, content: dict) -> None:
        """Append the line of a finished unit."""
        names = ("study", "arm", "family", "size", "seed")
        line = dict(zip(names, unit.key, strict=True)) | {"seconds": round(seconds, 1), **content}
        line["finished"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self._append(line)
        self.lines[unit.key] = line

    def _append(self, line: dict) -> None:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            drop_truncated_line(file)
            os.lseek(file, 0, os.SEEK_END)
            os.write(file, (json.dumps(line, ensure_ascii=False) + "\n").encode())
            os.fsync(file)
        finally:
            os.close(file)


def _read_key(line: dict) -> tuple:
    return tuple(line[name] for name in ("study", "arm", "family", "size", "seed"))


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
