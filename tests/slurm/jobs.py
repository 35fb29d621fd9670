"""A corpus, a run that takes seconds, and its submission."""

import re
from pathlib import Path

from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.tools.call import call_tool

YAML = """
model: {{layers: 2, hidden_size: 32, heads: 4, init_std: 0.02}}
data: {{seq_length: 32, packing: stream, workers: 1, shards: {shards}}}
train: {{steps: 12, global_batch_size: 4, micro_batch_size: 1, precision: fp32, threads: 1}}
schedule: {{warmup_steps: 5}}
checkpoint: {{interval: 4, keep_last: 2}}
"""


def make_corpus(folder):
    """Write shards/ and config.yaml."""
    write_shards(folder / "shards", make_pairs(40, make_vocabulary()), make_vocabulary())
    (folder / "config.yaml").write_text(YAML.format(shards=folder / "shards"))
    return folder


def submit_run(corpus, output, *more):
    """Submit a run on two nodes; returns (job ID, log)."""
    arguments = [f"output={corpus / output}", "--nodes", 2, "--time", 5]
    done = call_tool("submit", "train", corpus / "config.yaml", *arguments, *more)
    assert done.returncode == 0, done.stderr
    job, log = re.fullmatch(r"job (\d+): (.*)\n", done.stdout).groups()
    return int(job), Path(log)
