"""FID, KID, precision and recall of folders of images, by torch-fidelity's network and functions.

    python tools/evaluate.py fid --images generated/ --reference real/ --crop center --size 256 --resize clean \\
        --weights weights-inception-2015-12-05-6726825d.pth --output results/

FID is computed in float64 from statistics that are summed over blocks; KID, precision and recall are torch-fidelity's
functions on the same features, which lie in a file: memory does not grow with the number of images. torch-fidelity's
own result is that of --resize legacy_tensorflow. With rank folders 0..N-1 of best-of-N each has its own figures, as the
paper's program computed them.
"""

import argparse

import numpy as np
import torch

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.evaluation.metrics.comparison import Comparison, Inputs, add_input_options, list_sets
from megatron_cm3leon.evaluation.metrics.distances import (
    INTERVAL,
    FrechetDistance,
    make_figure,
    polynomial_kernel,
    resample_discrepancy,
)
from megatron_cm3leon.evaluation.metrics.fidelity import load_fidelity
from megatron_cm3leon.evaluation.metrics.inception import KNOWN_WEIGHTS, Inception, verify_weights
from megatron_cm3leon.evaluation.metrics.resize import MODES
from megatron_cm3leon.evaluation.metrics.statistics import Statistics
from megatron_cm3leon.evaluation.result import Figure, Result, bootstrap, read_versions

NEIGHBOR_BATCH = 1000
"""Rows of the distances of precision and recall that are in memory at a time."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the task."""
    add_input_options(parser)
    add = parser.add_argument
    add("--weights", type=user_path, required=True, help=f"file of Inception weights: {', '.join(KNOWN_WEIGHTS)}")
    add(
        "--weights-sha256", help="SHA-256 of other weights in that layout; the distance is then named after it, not FID"
    )
    add("--resize", choices=MODES, default="clean", help="how images are resized to 299 x 299; names of clean-fid")
    add("--only-fid", action="store_true", help="without KID, precision and recall")
    add("--kid-subsets", type=int, default=100, help="random subsets that KID is the mean of")
    add("--kid-subset-size", type=int, default=1000, help="images of a subset")
    add("--neighbors", type=int, default=3, help="nearest neighbors that define the manifold of precision and recall")


def evaluate(
    *,
    weights: str,
    weights_sha256: str | None = None,
    resize: str = "clean",
    only_fid: bool = False,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    neighbors: int = 3,
    **options,
) -> Result:
    """Measure folders of images; further keyword arguments are the fields of `Inputs`.

    Raises ValueError for input that cannot be measured.
    """
    for name, value, minimum in (
        ("kid-subsets", kid_subsets, 1),
        ("kid-subset-size", kid_subset_size, 2),
        ("neighbors", neighbors, 1),
    ):
        if value < minimum:
            raise ValueError(f"--{name} ({value}) must be at least {minimum}.")
    inputs = Inputs(**options)
    sets, reference = list_sets(inputs)
    network = Inception(verify_weights(weights, weights_sha256), resize, resolve_device(inputs.device))
    metrics = Metrics(network, inputs, only_fid, kid_subsets, kid_subset_size, neighbors)
    comparison = Comparison("fid", inputs, sets, reference, network)
    figures = comparison.run(metrics.measure)
    return Result(
        task="fid",
        figures=figures,
        settings=comparison.settings | metrics.settings,
        seed=inputs.seed,
        inputs=comparison.hashes,
        versions=read_versions(("torch-fidelity",)),
        notes=comparison.notes + metrics.notes,
    )


class Metrics:
    """FID, KID, precision and recall of features."""

    def __init__(
        self,
        network: Inception,
        inputs: Inputs,
        only_fid: bool,
        kid_subsets: int,
        kid_subset_size: int,
        neighbors: int,
    ) -> None:
        self.name, self.inputs, self.only_fid = network.name, inputs, only_fid
        self.kid_subsets, self.kid_subset_size, self.neighbors = kid_subsets, kid_subset_size, neighbors
        self.distance: FrechetDistance | None = None
        self.notes: list[str] = []
        if not network.weights.published:
            self.notes.append(
                f"the weights {network.weights.sha256} are not the published ones: the figures are not FID and KID."
            )

    @property
    def settings(self) -> dict:
        """Options that change a figure."""
        return {
            "kid_subsets": self.kid_subsets,
            "kid_subset_size": self.kid_subset_size,
            "neighbors": self.neighbors,
            "interval": INTERVAL.format(resamples=self.inputs.resamples),
        }

    def measure(self, features: np.ndarray, real: np.ndarray | None, reference: Statistics) -> dict[str, Figure]:
        """Figures of one set of images, [n, 2048]."""
        self.distance = self.distance or FrechetDistance(reference)
        figures = {self.name: self.distance.measure(features, self.inputs.resamples, self.inputs.seed)}
        if real is None:
            self._note("the reference has statistics only: KID, precision and recall, which require images, are off.")
            return figures
        if self.only_fid:
            return figures
        return figures | self._kid(features, real) | self._neighborhoods(features, real)

    def _kid(self, features: np.ndarray, real: np.ndarray) -> dict[str, Figure]:
        size = min(self.kid_subset_size, len(features), len(real))
        if size < self.kid_subset_size:
            self._note(
                f"KID subsets have {size:,} images instead of {self.kid_subset_size:,}: there are {len(features):,} "
                f"images and {len(real):,} of the reference."
            )
        kid = load_fidelity("metric_kid")
        options = {"kid_subsets": self.kid_subsets, "kid_subset_size": size, "verbose": False}
        found = kid.kid_features_to_metric(
            torch.from_numpy(features), torch.from_numpy(real), rng_seed=self.inputs.seed, **options
        )
        resampled = resample_discrepancy(features, real, polynomial_kernel, self.inputs.resamples, self.inputs.seed)
        value = found[kid.KEY_METRIC_KID_MEAN]
        return {self._rename("kid"): make_figure(value, resampled, len(features))}

    def _neighborhoods(self, features: np.ndarray, real: np.ndarray) -> dict[str, Figure]:
        if min(len(features), len(real)) <= self.neighbors:
            self._note(f"precision and recall are off: they require more than {self.neighbors} images on both sides.")
            return {}
        precision, recall = load_fidelity("metric_prc").calculate_precision_recall_part(
            torch.from_numpy(features), torch.from_numpy(real), self.neighbors, NEIGHBOR_BATCH
        )
        return {
            self._rename("precision"): self._share(precision, len(features)),
            self._rename("recall"): self._share(recall, len(real)),
        }

    def _share(self, share: float, n: int) -> Figure:
        """A share of n images with the interval of a bootstrap over them: its value says how many count."""
        if self.inputs.resamples < 2:
            return Figure(share, n=n)
        counted = np.arange(n) < round(share * n)
        return bootstrap(counted, seed=self.inputs.seed)

    def _rename(self, metric: str) -> str:
        return metric if self.name == "fid" else f"{self.name}-{metric}"

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
