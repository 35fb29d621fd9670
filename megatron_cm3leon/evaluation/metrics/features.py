"""Features of a folder of images in a file on disk: memory does not grow with the images, and the work resumes.

    OUTPUT/features/NAME.npy    float32 [images, width], written in chunks; OUTPUT/items.jsonl says which are complete

The file is kept: the same command with other settings of the metrics does not compute the features again.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_cm3leon.common.progress import Meter, meter
from megatron_cm3leon.evaluation.metrics.image_folder import Preparation
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
    network: Network,
    preparation: Preparation,
    output: str | Path,
    finished: FinishedItems,
    batch_size: int,
) -> np.ndarray:
    """Features float32 [files, width] of images, as a file that is mapped into memory.

    Chunks that `finished` has are kept. Raises ValueError for images that cannot be read, and for features that are
    not finite numbers.
    """
    path = Path(output) / "features" / f"{name}.npy"
    done = {key for key in finished.items if key.startswith(f"{name}/")}
    stored = _open_features(path, (len(files), network.width), keep=bool(done))
    starts = range(0, len(files), CHUNK)
    with ThreadPoolExecutor(THREADS) as pool, meter(len(files), f"features of {name}", "images") as progress:
        for start in starts:
            chunk = files[start : start + CHUNK]
            if f"{name}/{start}" in done:
                progress.advance(len(chunk))
                continue
            _extract_chunk(chunk, network, preparation, stored[start : start + CHUNK], batch_size, pool, progress)
            stored.flush()
            finished.add(f"{name}/{start}", {"images": len(chunk)})
    # Copy-on-write: what reads the features cannot change the file.
    return np.load(path, mmap_mode="c")


def _open_features(path: Path, shape: tuple[int, int], keep: bool) -> np.memmap:
    path.parent.mkdir(parents=True, exist_ok=True)
    if keep:
        try:
            stored = np.load(path, mmap_mode="r+")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}), but items.jsonl beside its folder records its images; "
                f"delete items.jsonl to compute them again."
            ) from error
        assert stored.shape == shape  # the list of images is part of the identity of items.jsonl
        return stored
    return np.lib.format.open_memmap(path, "w+", np.float32, shape)


def _extract_chunk(
    files: Sequence[Path],
    network: Network,
    preparation: Preparation,
    stored: np.ndarray,
    batch_size: int,
    pool: ThreadPoolExecutor,
    progress: Meter,
) -> None:
    """Fill `stored` with the features of `files`."""
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
        progress.advance(len(images))


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
