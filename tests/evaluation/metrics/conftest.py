"""Random Inception weights, written once."""

import pytest

from megatron_cm3leon.evaluation.metrics.inception import write_random_weights


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """(file, its SHA-256) of random weights in the layout of the published .pth files."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    return path, write_random_weights(path)
