"""What every test shares."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, reason_unavailable

# Before torch is imported: the machine's cores belong to the ranks under test; with tiny tensors a second
# thread costs more than it brings, and it sums in another order.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Groups for `--dist loadgroup`: a file's tests share its fixtures; one SLURM cluster serves all its tests."""
    for item in items:
        group = "slurm" if "cluster" in item.fixturenames else item.path.relative_to(Path(__file__).parent).as_posix()
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def cluster():
    """A real SLURM of two virtual nodes, for all tests that ask for it."""
    if reason := reason_unavailable():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    with Cluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster, which SLURM's commands of this test's process find too."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster
