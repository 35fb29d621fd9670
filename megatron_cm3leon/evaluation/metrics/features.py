"""Features of a folder of images in a file on disk: memory does not grow with the images, and the work resumes.

    OUTPUT/features/NAME.npy    float32 [images, width], written in chunks; OUTPUT/items.jsonl says which are complete

The file is kept: the same command with other settings of the metrics does not compute the features again.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.evaluation.metrics.image_folder import Preparation, hash_lines
from megatron_cm3leon.evaluation.result import FinishedItems

CHUNK = 512
"""Images between two records of progress."""
THREADS = 2
"""Threads that read and resize the next batch while the network computes."""


class Network(Protocol):
    """What turns images into features."""

    width: int

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> dict[str, str]: ...
    def prepare(self, image_HW3: np.ndarray) -> np.ndarray: ...
    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


def extract_features(
    name: str,
    files: Sequence[Path],
    lines: Sequence[str],
    network: Network,
    preparation: Preparation,
    output: str | Path,
    finished: FinishedItems,
    batch_size: int,
) -> np.ndarray:
    """Features float32 [files, width] of images, as a file that is mapped into memory.

    `lines` identify the files (image_folder.py). Features that `finished` has are kept, those before an image that
    cannot be read too: files after them may be replaced or removed. Raises ValueError for images that cannot be read,
    for changed images whose features are finished, and for features that are not finite numbers.
    """
    path = Path(output) / "features" / f"{name}.npy"
    start = count_finished(name, lines, finished)
    stored = _open_features(path, (len(files), network.width), start)
    with ThreadPoolExecutor(THREADS) as pool, meter(len(files), f"features of {name}", "images") as progress:
        progress.advance(start)
        while start < len(files):
            end = min((start // CHUNK + 1) * CHUNK, len(files))
            encoded = 0
            try:
                for n in _extract_chunk(files[start:end], network, preparation, stored[start:end], batch_size, pool):
                    encoded += n
                    progress.advance(n)
            finally:  # complete batches are kept, whatever ended the chunk
                if encoded:
                    stored.flush()
                    sha256 = hash_lines(lines[start : start + encoded])
                    finished.add(f"{name}/{start}", {"images": encoded, "sha256": sha256})
            start = end
    # Copy-on-write: what reads the features cannot change the file.
    return np.load(path, mmap_mode="c")


def count_finished(name: str, lines: Sequence[str], finished: FinishedItems) -> int:
    """Images of a set, from its first on, whose features are finished; ValueError if one of them has changed."""
    count = 0
    while item := finished.items.get(f"{name}/{count}"):
        end = count + item["images"]
        # Items without it are of an identity that has the whole folder.
        if "sha256" in item and item["sha256"] != hash_lines(lines[count:end]):
            raise ValueError(
                f"{finished.path} is of a run with different inputs ({name}); give another --output, or delete the "
                f"file."
            )
        count = end
    return count


def _open_features(path: Path, shape: tuple[int, int], done: int) -> np.memmap:
    """The file for features of `shape`, with the first `done` rows of the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not done:
        return np.lib.format.open_memmap(path, "w+", np.float32, shape)
    try:
        stored = np.load(path, mmap_mode="r+")
        if len(stored) < done:
            raise ValueError(f"it has {len(stored)} rows instead of {done} or more")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}), but items.jsonl beside its folder records its images; "
            f"delete items.jsonl to compute them again."
        ) from error
    if stored.shape == shape:
        return stored
    # Images were added or removed after the finished ones.
    temporary = path.with_suffix(".tmp")
    resized = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
    for start in range(0, done, CHUNK):
        resized[start : min(start + CHUNK, done)] = stored[start : min(start + CHUNK, done)]
    resized.flush()
    temporary.replace(path)
    return resized


def _extract_chunk(
    files: Sequence[Path],
    network: Network,
    preparation: Preparation,
    stored: np.ndarray,
    batch_size: int,
    pool: ThreadPoolExecutor,
) -> Iterator[int]:
    """Fill `stored` with the features of `files`; yields the number of images of each batch that is stored."""
    for start, images in _load_batches(files, network, preparation, batch_size, pool):
        features = network.encode(images)
        if features.shape != (len(images), network.width):
            raise ValueError(
                f"{network.name} has {features.shape[-1]} features per image instead of {network.width}; give the "
                f"weights of the network that the task names."
            )
        damaged = ~np.isfinite(features).all(axis=1)
        if damaged.any():
            raise ValueError(
                f"{network.name} has features that are not finite numbers (NaN) for {int(damaged.sum())} of "
                f"{len(damaged)} images, such as {files[start + int(damaged.argmax())]}; check the weights."
            )
        stored[start : start + len(images)] = features
        yield len(images)


def _load_batches(
    files: Sequence[Path], network: Network, preparation: Preparation, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(position of the first image, prepared images) of each batch; the next batch is read meanwhile."""

    def load(path: Path) -> np.ndarray:
        return network.prepare(preparation.load(path))

    def submit(start: int) -> list[Future]:
        return [pool.submit(load, path) for path in files[start : start + batch_size]]

    coming = submit(0)
    for start in range(0, len(files), batch_size):
        current, coming = coming, submit(start + batch_size)
        yield start, [future.result() for future in current]
