"""Arrays on disk that are computed in fixed parts of rows, by one or several tasks, and joined at the end.

    folder/<name>.json                 settings; another run goes on only with the same ones
    folder/.<name>/part-000012.npz     rows of one part, renamed when whole
    folder/<array>.npy                 all rows, once every part is there

Part p holds rows [p * size, (p + 1) * size) whoever computes it, so the bytes do not depend on the tasks.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_cm3leon.data.shards.reader import write_json


class Rows:
    """Arrays of `count` rows each that belong together, under `name` in `folder`."""

    def __init__(self, folder: Path, name: str, arrays: list[str], count: int, size: int, settings: dict) -> None:
        """`arrays` are names of files; ValueError where the folder holds such rows made with other settings."""
        self.folder, self.name, self.arrays, self.count, self.size = folder, name, arrays, count, size
        self.parts = -(-count // size)
        self.work = folder / f".{name}"
        settings = {**settings, "part_size": size}
        note = folder / f"{name}.json"
        if note.is_file():
            _compare(json.loads(note.read_text()), settings, folder / f"{arrays[0]}.npy")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for array in arrays:  # of unknown settings
                (folder / f"{array}.npy").unlink(missing_ok=True)
            write_json(note, settings)

    @property
    def joined(self) -> bool:
        """Whether the arrays are whole."""
        return all((self.folder / f"{array}.npy").is_file() for array in self.arrays)

    def missing(self, task: int = 0, tasks: int = 1) -> list[int]:
        """Parts of this task that are not on the disk."""
        if self.joined:
            return []
        return [part for part in range(task, self.parts, tasks) if not self._path(part).is_file()]

    def range(self, part: int) -> range:
        """Rows of a part."""
        return range(part * self.size, min((part + 1) * self.size, self.count))

    def write(self, part: int, content: dict[str, np.ndarray]) -> None:
        """Put a part on the disk, under a temporary name until it is whole."""
        assert list(content) == self.arrays, f"{list(content)} instead of {self.arrays}"
        rows = len(self.range(part))
        assert all(len(array) == rows for array in content.values()), f"part {part} of {self.name} has not {rows} rows"
        self.work.mkdir(exist_ok=True)
        temporary = self._path(part).with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path(part))

    def join(self, advance: Callable[[int], None] = lambda rows: None) -> None:
        """Write the whole arrays and remove the parts; ValueError that names what is missing.

        Rows that are narrower than others' are filled with zeros.
        """
        if self.joined:
            shutil.rmtree(self.work, ignore_errors=True)
            return
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{len(missing)} of {self.parts} parts of {self.folder / self.name} are not done, such as part "
                f"{missing[0]}; run the tasks that have not ended (of N tasks, part p belongs to task p modulo N), or "
                f"the same command as one task."
            )
        shapes = [self._shapes(part) for part in range(self.parts)]
        outputs = {}
        for array in self.arrays:
            shape = (self.count, *np.max([each[array] for each in shapes], axis=0).tolist())
            dtype = self._load(0)[array].dtype
            outputs[array] = np.lib.format.open_memmap(self.folder / f".{array}.tmp", "w+", dtype, shape)
        for part in range(self.parts):
            rows, content = self.range(part), self._load(part)
            for array, output in outputs.items():
                values = content[array]
                output[(slice(rows.start, rows.stop), *(slice(0, width) for width in values.shape[1:]))] = values
            advance(len(rows))
        for array, output in outputs.items():
            output.flush()
            os.replace(self.folder / f".{array}.tmp", self.folder / f"{array}.npy")
        shutil.rmtree(self.work)

    def load(self, array: str) -> np.ndarray:
        """Map a joined array."""
        return load_rows(self.folder / f"{array}.npy")

    def _path(self, part: int) -> Path:
        return self.work / f"part-{part:06d}.npz"

    def _load(self, part: int):
        return np.load(self._path(part), allow_pickle=False)

    def _shapes(self, part: int) -> dict[str, tuple[int, ...]]:
        content = self._load(part)
        return {array: content[array].shape[1:] for array in self.arrays}


def to_float32(vectors: np.ndarray) -> np.ndarray:
    """A copy as float32; of float16, torch makes it several times as fast as numpy."""
    if vectors.dtype != np.float16:
        return np.array(vectors, np.float32)
    return torch.from_numpy(np.array(vectors)).float().numpy()


def load_rows(path: Path) -> np.ndarray:
    """Map a .npy file; ValueError where it is none."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is unreadable ({error}); build it again: tools/build_index.py --overwrite."
        ) from error


def _compare(written: dict, settings: dict, what: Path) -> None:
    names = sorted({*written, *settings})
    differing = [
        f"{name}: {written.get(name)} instead of {settings.get(name)}"
        for name in names
        if written.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{what} was begun with other settings ({'; '.join(differing)}); give another --output, or --overwrite "
            f"to make it again."
        )
