"""Mean and covariance of features, and the .npz files in which FID programs exchange them (`mu`, `sigma`).

Files that this project writes also have `n`, the number of images, and `record`, a JSON text: the SHA-256 of the
network's weights, the resizing and the preparation of the images. Files of other programs have neither.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BLOCK = 4096
"""Rows that are read at a time."""


@dataclass(frozen=True)
class Statistics:
    """First two moments of features."""

    mean: np.ndarray
    """float64 [width]."""
    covariance: np.ndarray
    """float64 [width, width], with divisor n - 1."""
    n: int | None = None
    """Images; None if a file does not say."""
    record: dict[str, str] = field(default_factory=dict)
    """What the features depend on; empty if a file does not say."""


def compute_statistics(features: np.ndarray, record: dict[str, str] | None = None) -> Statistics:
    """Statistics of features [n, width] by sums over blocks in float64; ValueError for fewer than 2."""
    n, width = features.shape
    if n < 2:
        raise ValueError(f"a covariance requires at least 2 images, but there is {n}; give more images.")
    mean = sum(block.sum(axis=0) for block in _blocks(features)) / n
    products = np.zeros((width, width))
    for block in _blocks(features):
        block -= mean
        products += block.T @ block
    return Statistics(mean, products / (n - 1), n, record or {})


def _blocks(features: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(features), BLOCK):
        yield features[start : start + BLOCK].astype(np.float64)


def write_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write mu and sigma as every FID program reads them, and n and record."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    record = json.dumps(statistics.record)
    np.savez(temporary, mu=statistics.mean, sigma=statistics.covariance, n=statistics.n or 0, record=record)
    os.replace(temporary, path)


def read_statistics(path: str | Path, width: int, expected: dict[str, str]) -> Statistics:
    """Read a file of statistics, and compare it with the network that it is used with.

    Raises ValueError if it is not such a file, has another width, values that are not finite, or records another
    value for a key of `expected`.
    """
    path = Path(path)
    try:
        with np.load(path) as content:
            mean, covariance = (np.asarray(content[name], np.float64) for name in ("mu", "sigma"))
            n = int(content["n"]) if "n" in content else None
            record = json.loads(str(content["record"])) if "record" in content else {}
    except FileNotFoundError as error:
        raise ValueError(f"--reference ({path}) does not exist; give a folder of images or an .npz file.") from error
    except Exception as error:  # np.load raises zip, pickle, key and value errors for foreign bytes
        # What NumPy says about bytes without a header advises to load them as a pickle.
        reason = error if zipfile.is_zipfile(path) else "it is not an .npz archive"
        raise ValueError(
            f"{path} is not a file of statistics with mu and sigma ({reason}); write one with --statistics."
        ) from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(
            f"{path} has statistics of another network: mu and sigma have the shapes {mean.shape} and "
            f"{covariance.shape}, but this network has {width} features; compute them with this network."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path} has values in mu or sigma that are not finite numbers; compute it again.")
    for key, value in expected.items():
        if key in record and record[key] != value:
            raise ValueError(
                f"{path} records statistics of another {key}: {record[key]}, not {value}; compute them again, or give "
                f"the same options."
            )
    return Statistics(mean, covariance, n or None, record)
