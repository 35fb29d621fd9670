"""Arrays on disk that are computed in parts of a fixed number of rows, by one or several tasks, and joined at the end.

    folder/<name>.json                 settings; a later run continues only with the same settings
    folder/.<name>/part-000012.npz     rows of one part, renamed when the file is complete
    folder/<array>.npy                 all rows, once every part is there

Part p holds rows [p * part_size, (p + 1) * part_size) whichever task computes it, so the bytes do not depend on the
number of tasks.
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


class PartitionedArrays:
    """Arrays with the same number of rows that are computed together, under `name` in `folder`."""

    def __init__(self, folder: Path, name: str, arrays: list[str], rows: int, part_size: int, settings: dict) -> None:
        """Open or begin the arrays.

        `arrays` are file names without `.npy`, `rows` the rows of each, `part_size` the rows per part. Raises
        ValueError if the folder holds arrays of this name that were begun with other `settings`.
        """
        self.folder, self.name, self.array_names, self.rows, self.part_size = folder, name, arrays, rows, part_size
        self.parts = -(-rows // part_size)
        self.parts_folder = folder / f".{name}"
        settings = {**settings, "part_size": part_size}
        settings_file = folder / f"{name}.json"
        if settings_file.is_file():
            _check_settings(json.loads(settings_file.read_text()), settings, folder / f"{arrays[0]}.npy")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for array in arrays:  # their settings are unknown
                (folder / f"{array}.npy").unlink(missing_ok=True)
            write_json(settings_file, settings)

    @property
    def joined(self) -> bool:
        """Whether the joined arrays are on disk."""
        return all((self.folder / f"{array}.npy").is_file() for array in self.array_names)

    def missing_parts(self, task: int = 0, tasks: int = 1) -> list[int]:
        """Parts of this task that are not on disk yet; part p belongs to task p modulo `tasks`."""
        if self.joined:
            return []
        return [part for part in range(task, self.parts, tasks) if not self._part_path(part).is_file()]

    def part_range(self, part: int) -> range:
        """Row numbers of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.rows))

    def write_part(self, part: int, content: dict[str, np.ndarray]) -> None:
        """Write the rows of one part, under a temporary name until the file is complete."""
        assert list(content) == self.array_names, f"{list(content)} instead of {self.array_names}"
        rows = len(self.part_range(part))
        assert all(len(array) == rows for array in content.values()), (
            f"part {part} of {self.name} must have {rows} rows"
        )
        self.parts_folder.mkdir(exist_ok=True)
        temporary = self._part_path(part).with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **content)  # type: ignore[arg-type]  # its annotation takes them for its option
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._part_path(part))

    def join(self, advance: Callable[[int], None] = lambda rows: None) -> None:
        """Write the joined arrays and remove the parts; ValueError names the missing parts.

        Parts may differ in width; narrower ones are padded with zeros. `advance(rows)` is called after each part.
        """
        if self.joined:
            shutil.rmtree(self.parts_folder, ignore_errors=True)
            return
        missing = self.missing_parts()
        if missing:
            raise ValueError(
                f"{len(missing)} of {self.parts} parts of {self.folder / self.name} are missing, such as part "
                f"{missing[0]}; run the unfinished tasks (with N tasks, part p belongs to task p modulo N), or the "
                f"same command as one task."
            )
        outputs = self._create_outputs()
        for part in range(self.parts):
            rows, content = self.part_range(part), self._load_part(part)
            for array, output in outputs.items():
                values = content[array]
                target = (slice(rows.start, rows.stop), *(slice(0, width) for width in values.shape[1:]))
                output[target] = values
            advance(len(rows))
        for array, output in outputs.items():
            output.flush()
            os.replace(self.folder / f".{array}.tmp", self.folder / f"{array}.npy")
        shutil.rmtree(self.parts_folder)

    def load(self, array: str) -> np.ndarray:
        """Map a joined array into memory."""
        return load_array(self.folder / f"{array}.npy")

    def _create_outputs(self) -> dict[str, np.memmap]:
        """Files for the joined arrays, as wide as the widest part."""
        shapes = [self._read_row_shapes(part) for part in range(self.parts)]
        outputs = {}
        for array in self.array_names:
            shape = (self.rows, *np.max([each[array] for each in shapes], axis=0).tolist())
            dtype = self._load_part(0)[array].dtype
            outputs[array] = np.lib.format.open_memmap(self.folder / f".{array}.tmp", "w+", dtype, shape)
        return outputs

    def _part_path(self, part: int) -> Path:
        return self.parts_folder / f"part-{part:06d}.npz"

    def _load_part(self, part: int) -> np.lib.npyio.NpzFile:
        return np.load(self._part_path(part), allow_pickle=False)

    def _read_row_shapes(self, part: int) -> dict[str, tuple[int, ...]]:
        content = self._load_part(part)
        return {array: content[array].shape[1:] for array in self.array_names}


def to_float32(vectors: np.ndarray) -> np.ndarray:
    """A copy as float32. float16 is converted by torch, which is several times faster than NumPy."""
    if vectors.dtype != np.float16:
        return np.array(vectors, np.float32)
    return torch.from_numpy(np.array(vectors)).float().numpy()


def load_array(path: Path) -> np.ndarray:
    """Map a .npy file into memory; ValueError if it is not a valid one."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is unreadable ({error}); build it again: tools/build_index.py --overwrite."
        ) from error


def _check_settings(written: dict, settings: dict, path: Path) -> None:
    names = sorted({*written, *settings})
    differing = [
        f"{name}: {written.get(name)} instead of {settings.get(name)}"
        for name in names
        if written.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} was begun with other settings ({'; '.join(differing)}); give another --output, or --overwrite "
            f"to build it again."
        )
