"""Generated images against a reference: what the tasks fid and fd share, from folders to features and statistics."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.evaluation.metrics.features import Network, count_finished, extract_features
from megatron_cm3leon.evaluation.metrics.image_folder import (
    CROPS,
    Preparation,
    check_sizes,
    find_rank_folders,
    hash_lines,
    identify_images,
    list_images,
)
from megatron_cm3leon.evaluation.metrics.statistics import (
    Statistics,
    compute_statistics,
    read_statistics,
    write_statistics,
)
from megatron_cm3leon.evaluation.result import Figure, FinishedItems, hash_input

MOST_RESAMPLES = 10_000
"""Every resample is a distance of its own, and needs 8 bytes per image."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Options of both tasks: what is compared with what, and how images are prepared."""

    output: str | Path
    images: str | Path | None = None
    reference: str | Path | None = None
    statistics: str | Path | None = None
    crop: str = "none"
    size: int | None = None
    save: str = "png"
    batch_size: int = 64
    resamples: int = 50
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class ImageSet:
    """A folder of images, as it is measured."""

    name: str
    """images, images-rank0 .. images-rankN, or reference."""
    suffix: str
    """What the keys of its figures end with: nothing, or -rank0 .. -rankN."""
    folder: Path
    files: list[Path]
    preparation: Preparation


Measure = Callable[[np.ndarray, np.ndarray | None, Statistics], dict[str, Figure]]
"""(features of images, features and statistics of the reference) -> figures. An .npz file has no features."""


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The command-line options of `Inputs`, without --output."""
    add = parser.add_argument
    add("--images", type=user_path, help="folder of generated images, or of rank folders 0..N-1 of best-of-N")
    add("--reference", type=user_path, help="folder of real images, or an .npz file with their mu and sigma")
    add("--statistics", type=user_path, help="also write mu and sigma of the reference folder to this .npz file")
    add("--crop", choices=CROPS, default="none", help="center: the largest centered square of every image")
    add("--size", type=int, help="resize every image to this height and width in pixels (bicubic) before the network")
    add("--save", default="png", help="png, or jpg:Q: generated images as if saved as JPEG of quality Q")
    add("--batch-size", type=int, default=64, help="images per batch of the network")
    add("--resamples", type=int, default=50, help="bootstrap resamples of an interval; 0: no intervals")
    add("--seed", type=int, default=0, help="of the resamples and subsets")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")


def list_sets(inputs: Inputs) -> tuple[list[ImageSet], ImageSet | None]:
    """The sets of generated images and the reference folder, checked; nothing is read but names and sizes.

    Raises ValueError for options and folders that cannot be used.
    """
    for name, minimum in (("batch_size", 1), ("resamples", 0), ("seed", 0)):
        if getattr(inputs, name) < minimum:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(inputs, name)}) must be at least {minimum}.")
    if inputs.resamples > MOST_RESAMPLES:
        raise ValueError(f"--resamples ({inputs.resamples}) must be at most {MOST_RESAMPLES}.")
    if inputs.resamples == 1:
        raise ValueError("--resamples (1) gives no standard deviation; give 2 or more, or 0 for no intervals.")
    given = bool(inputs.images) + bool(inputs.reference)
    if given < 2 and not (given and inputs.statistics):
        raise ValueError("a distance requires --images and --reference; --statistics alone requires one of them.")
    prepared = Preparation(inputs.crop, inputs.size, inputs.save)
    sets = []
    if inputs.images:
        ranks = find_rank_folders(inputs.images)
        for number, folder in enumerate(ranks or [Path(inputs.images)]):
            suffix = f"-rank{number}" if ranks else ""
            files = list_images(folder, "--images")
            check_sizes(files, "--images", prepared)
            sets.append(ImageSet(f"images{suffix}", suffix, folder, files, prepared))
    if inputs.reference is None or Path(inputs.reference).is_file() or str(inputs.reference).endswith(".npz"):
        if inputs.statistics and (inputs.reference or len(sets) != 1):
            raise ValueError(
                f"--statistics ({inputs.statistics}) requires one folder of images to compute them of; give a folder "
                f"as --reference."
            )
        return sets, None
    prepared = Preparation(inputs.crop, inputs.size)
    files = list_images(inputs.reference, "--reference")
    check_sizes(files, "--reference", prepared)
    return sets, ImageSet("reference", "", Path(inputs.reference), files, prepared)


class Comparison:
    """Figures of each set of images against the reference."""

    def __init__(self, task: str, inputs: Inputs, sets: list[ImageSet], reference: ImageSet | None, network: Network):
        """`sets` and `reference` are what list_sets returned."""
        self.task, self.inputs, self.sets, self.reference, self.network = task, inputs, sets, reference, network
        self.record = network.identity | {"crop": inputs.crop, "size": str(inputs.size or "as it is")}
        folders = [*sets, *([reference] if reference else [])]
        self.lines = {each.name: identify_images(each.folder, each.files) for each in folders}
        self.hashes = {name: hash_lines(lines) for name, lines in self.lines.items()}
        self.hashes["network"] = network.identity["network"]
        self.notes: list[str] = []
        if inputs.reference and reference is None:
            # Read before the images: a file of another network must not cost hours first.
            self.known = read_statistics(inputs.reference, network.width, self.record)
            self.hashes["reference"] = hash_input(inputs.reference)

    def run(self, measure: Measure) -> dict[str, Figure]:
        """Compute features, write --statistics, and measure each set of images."""
        figures: dict[str, Figure] = {}
        with self._finished() as finished:
            features, statistics = self._reference_features(finished)
            for each in self.sets:
                found = self._extract(each, finished)
                self._check_count(each.name, len(found))
                if statistics is None:
                    write_statistics(str(self.inputs.statistics), compute_statistics(found, self.record))
                    figures["images"] = Figure(len(found), n=len(found))
                    continue
                for name, figure in measure(found, features, statistics).items():
                    figures[f"{name}{each.suffix}"] = figure
            if not self.sets and self.reference:
                figures["images"] = Figure(len(self.reference.files), n=len(self.reference.files))
        return figures

    @property
    def settings(self) -> dict:
        """Options of both tasks that change a figure."""
        inputs = self.inputs
        return self.network.identity | {
            "crop": inputs.crop,
            "size": inputs.size,
            "save": inputs.save,
            "resamples": inputs.resamples,
        }

    @contextmanager
    def _finished(self) -> Iterator[FinishedItems]:
        preparation = asdict(Preparation(self.inputs.crop, self.inputs.size, self.inputs.save))
        identity = {"task": self.task, "preparation": preparation, "network": self.network.identity}
        # Images have their hashes beside their features: those that are not finished may be replaced or removed.
        files = {name: value for name, value in self.hashes.items() if name not in self.lines}
        former = identity | {"inputs": self.hashes}
        finished = FinishedItems(self.inputs.output, identity | {"inputs": files}, former=former)
        try:
            for name, lines in self.lines.items():
                count_finished(name, lines, finished)  # before hours are spent
            yield finished
        finally:
            finished.close()

    def _reference_features(self, finished: FinishedItems) -> tuple[np.ndarray | None, Statistics | None]:
        if self.reference is None:
            if not self.inputs.reference:
                return None, None
            if missing := sorted({*self.record} - {*self.known.record}):
                self.notes.append(
                    f"{self.inputs.reference} does not record its {', '.join(missing)}: whether they are those of this "
                    f"result could not be verified."
                )
            if self.known.n:
                self._check_count("reference", self.known.n)
            return None, self.known
        features = self._extract(self.reference, finished)
        statistics = compute_statistics(features, self.record)
        self._check_count("reference", len(features))
        if self.inputs.statistics:
            write_statistics(self.inputs.statistics, statistics)
        return features, statistics

    def _extract(self, each: ImageSet, finished: FinishedItems) -> np.ndarray:
        return extract_features(
            each.name,
            each.files,
            self.lines[each.name],
            self.network,
            each.preparation,
            self.inputs.output,
            finished,
            self.inputs.batch_size,
        )

    def _check_count(self, name: str, n: int) -> None:
        if n < self.network.width:
            self.notes.append(
                f"{name}: {n:,} images are fewer than the {self.network.width:,} features, so the covariance is "
                f"singular and the Fréchet distance has a large bias; compare only with results of the same N."
            )
