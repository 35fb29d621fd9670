"""A corpus and a run that take seconds."""

import pytest

from tests.data.corpora import make_pairs, make_vocabulary, write_shards


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with shards/ and a config.yaml of a run that takes seconds."""
    folder = tmp_path_factory.mktemp("runs")
    write_shards(folder / "shards", make_pairs(40, make_vocabulary()), make_vocabulary())
    (folder / "config.yaml").write_text(YAML.format(shards=folder / "shards"))
    return folder


YAML = """
model: {{layers: 2, hidden_size: 32, heads: 4, init_std: 0.02}}
data: {{seq_length: 32, packing: stream, workers: 1, shards: {shards}}}
train: {{steps: 12, global_batch_size: 4, micro_batch_size: 1, precision: fp32, threads: 1}}
schedule: {{warmup_steps: 5}}
checkpoint: {{interval: 4, keep_last: 2}}
"""
