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


LONG = tuple(f"tests/{folder}/" for folder in ("distributed", "examples", "runtime", "engine", "slurm", "training"))
"""Folders of the longest files, which begin first: at the end of the suite no process waits for another."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(scope="session")
def cluster():
    """A real SLURM of two virtual nodes, for all tests that use it."""
    if reason := reason_unavailable():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    with Cluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def single_rank():
    """Process group of a single rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster, also for SLURM's commands in the process of the test, which find it by SLURM_CONF."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster
