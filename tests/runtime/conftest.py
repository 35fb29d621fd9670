"""A corpus, a configuration whose steps take milliseconds, and the losses of an uninterrupted run."""

import pytest

from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.history import losses
from tests.runtime.world import World

YAML = """
model: {layers: 2, hidden_size: 32, heads: 4, init_std: 0.02}
data: {seq_length: 32, packing: stream, workers: 1}
train: {steps: 24, global_batch_size: 4, micro_batch_size: 2, precision: fp32, threads: 1, device: cpu}
schedule: {warmup_steps: 5}
checkpoint: {interval: 4, keep_last: 2}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """shards/ and config.yaml."""
    folder = tmp_path_factory.mktemp("survive")
    write_shards(folder / "shards", make_pairs(40, make_vocabulary()), make_vocabulary())
    (folder / "config.yaml").write_text(YAML)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(folder):
    """Losses of an uninterrupted run with two ranks."""
    world = World(folder, "uninterrupted", 2)
    assert world.wait() == [0, 0], world.output()
    return losses(folder / "uninterrupted")
