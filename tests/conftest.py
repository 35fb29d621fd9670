"""Settings and fixtures of all tests."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, reason_unavailable

# Before torch is imported: the cores of the machine are for the ranks under test; with tiny tensors a second
# thread costs more time than it saves, and it changes the order of sums.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Groups for `--dist loadgroup`: a file's tests share its fixtures; one SLURM cluster serves all its tests."""
    for item in items:
        group = "slurm" if "cluster" in item.fixturenames else item.path.relative_to(Path(__file__).parent).as_posix()
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def cluster():
    """A real SLURM of two virtual nodes, for all tests that use it."""
    if reason := reason_unavailable():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    with Cluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster, also for SLURM's commands in the process of the test, which find it by SLURM_CONF."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster
