"""Writes a small run folder, its shards and its index with the source tree of a commit: a fixture of test_old_runs.py.

    cp tests/golden/write_old_run.py /tmp && cd TREE_OF_A_COMMIT
    PYTHONPATH=$PWD python /tmp/write_old_run.py /tmp/old-run
    tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C /tmp -cJf .../tests/golden/COMMIT.tar.xz old-run

The run stops at step 6 of 8, with a checkpoint; expected.json has the losses with which that source tree continues.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.monitoring.history import read_metrics
from megatron_cm3leon.retrieval.build import build_index_folder
from megatron_cm3leon.retrieval.encoder import TEXT_MODEL, build_tiny_clip, save_clip
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.tokenizers.text import train_text
from tests.data.runs import run as preprocess

CONFIG = """
model: {layers: 1, hidden_size: 8, heads: 2, init_std: 0.02}
data: {seq_length: 63, packing: documents, attention: sample, workers: 0, shards: shards}
retrieval: {documents: 1, index: index}
cm3: {mean_spans: 2.0}
train: {steps: 8, global_batch_size: 4, micro_batch_size: 2, precision: fp32, threads: 1, skip_batches: '2'}
schedule: {warmup_steps: 2}
checkpoint: {interval: 3, keep_last: 1}
"""


def write_pairs(folder: Path, count: int) -> Path:
    """Images of a single gray level each, with captions."""
    folder.mkdir()
    lines = []
    for number in range(count):
        Image.new("RGB", (8, 8), (number * 7 % 256,) * 3).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"gray number {number}", "id": number}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def write_data() -> None:
    """shards/ and index/."""
    pairs = write_pairs(Path("raw"), 24)
    preprocess(pairs, Path("shards"), part_size=16)
    text = train_text((row["caption"] + "\n" for row in open_shards("shards").metadata().to_pylist()), 290)
    Path("clip").mkdir()
    text.save(Path("clip") / TEXT_MODEL)
    torch.manual_seed(0)
    save_clip(build_tiny_clip(text.size, 8, 8, 8, 1), Path("clip"))
    build_index_folder("index", "shards", "clip", options=IndexOptions(neighbors=2, threshold=1.0, device="cpu"))


def train(*overrides: str) -> None:
    names = ("RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "megatron_cm3leon.train", "config.yaml", "output=run", *overrides]
    subprocess.run(command, check=True, env=environment)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir()
    os.chdir(folder)
    write_data()
    Path("config.yaml").write_text(CONFIG)
    train("train.stop_after=6")
    shutil.copytree("run", "stopped")
    train()
    losses = {line["step"]: line["loss"] for line in read_metrics("run") if line["step"] > 6}
    Path("expected.json").write_text(json.dumps({"losses": losses}) + "\n")
    for name in ("run", "raw", "clip", "stopped/tensorboard"):
        shutil.rmtree(name)
    os.rename("stopped", "run")
    Path("run/lock").unlink()  # contains the name of the machine, as events do
    events = Path("run/events.jsonl")
    events.write_text(events.read_text().replace(json.dumps(os.uname().nodename), '"node1"'))


if __name__ == "__main__":
    main()
