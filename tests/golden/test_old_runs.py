"""Runs, shards and indexes of earlier commits (write_old_run.py) are read, and training continues as before.

The runs stopped at step 6 and batch 7 (batch 2 was skipped), of batches of 4 sequences.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.data.stream.identity import describe_sources, identify
from megatron_cm3leon.data.stream.stream import build_stream
from megatron_cm3leon.export import export_checkpoint, import_export
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.monitoring.history import read_metrics
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from tests.distributed.launch import child_environment
from tests.tools.call import call_tool

COMMITS = ["ad3992f", "b00d2b4"]
TRAIN_ALL = """
import json, os, sys
from megatron_cm3leon.train import main
for folder, *overrides in json.load(sys.stdin):
    os.chdir(folder)
    status = main(["config.yaml", "output=run", *overrides])
    assert status == 0, f"exit status {status} of {overrides} in {folder}"
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Commit -> run/, shards/, index/ and expected.json, the run resumed; `resized` with other batch sizes."""
    folder, trainings = tmp_path_factory.mktemp("old"), []
    for commit in COMMITS:
        with tarfile.open(Path(__file__).with_name(f"{commit}.tar.xz")) as archive:
            archive.extractall(folder, filter="data")
        (folder / "old-run").rename(folder / commit)
        trainings.append([str(folder / commit)])
    shutil.copytree(folder / COMMITS[0], folder / "resized")
    resized, field = [str(folder / "resized"), "train.steps=12"], "train.global_batch_size"
    first = [f"{field}=8", "train.stop_after=8", "train.skip_batches='2,8'"]
    second = [f"{field}=2", "train.stop_after=10", "data.workers=2"]
    trainings += [[*resized, *overrides, "--allow-change", field] for overrides in (first, second)]
    names = ("RANK", "WORLD_SIZE")
    environment = {name: value for name, value in child_environment().items() if name not in names}
    command, text = [sys.executable, "-c", TRAIN_ALL], json.dumps(trainings)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no sample is skipped or repeated" in done.stderr
    return folder


@pytest.mark.parametrize("commit", COMMITS)
def test_an_old_run_continues_with_its_sequences_and_losses(folders, commit):
    run = folders / commit / "run"
    expected = json.loads((folders / commit / "expected.json").read_text())["losses"]
    lines = read_metrics(run)
    assert {str(line["step"]): line["loss"] for line in lines[6:]} == pytest.approx(expected, rel=1e-4)
    assert [line["first_sequence"] for line in lines[6:]] == [28, 32]
    assert all(set(lines[0]) <= set(line) for line in lines)
    state = CheckpointReader(list_checkpoints(run)[-1]).state
    assert (state.step, state.batch, state.sequence, state.changes) == (8, 9, 36, [])
    assert state.stream_parts["version"] == 2


@pytest.mark.parametrize("commit", COMMITS)
def test_an_old_index_and_identity_are_accepted(folders, commit, monkeypatch):
    monkeypatch.chdir(folders / commit)
    with tarfile.open(Path(__file__).with_name(f"{commit}.tar.xz")) as archive:
        text = archive.extractfile("old-run/run/checkpoints/step-00000006/state.json").read()
    config = load_config("run/config.yaml")
    stream = build_stream(config)
    assert stream.samples.documents == 1
    sources = describe_sources(stream.samples, config)
    assert identify(sources, config, version=1) == json.loads(text)["stream"] != stream.identity


@pytest.mark.parametrize("commit", COMMITS)
def test_old_shards_are_read_completely(folders, commit):
    corpus = open_shards(folders / commit / "shards")
    texts = [bytes(corpus.read(number)[: corpus.lengths[number] - 5].astype(np.uint8)).decode() for number in range(24)]
    assert texts == corpus.metadata(["caption"])["caption"].to_pylist() == [f"gray number {n}" for n in range(24)]


def test_a_changed_batch_size_neither_skips_nor_repeats_a_sequence(folders, monkeypatch):
    """Batches 0 to 6 of 4 sequences, 7 to 9 of 8 (8 skipped by train.skip_batches), 10 and 11 of 2."""
    run = folders / "resized/run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][7:]
    found = [(line["step"], line["batch"], line["first_sequence"], line["sequences"]) for line in lines]
    assert found == [(7, 7, 28, 8), (7, 8, 36, 8), (8, 9, 44, 8), (9, 10, 52, 2), (10, 11, 54, 2)]
    state = CheckpointReader(list_checkpoints(run)[-1]).state
    assert (state.step, state.batch, state.sequence) == (10, 12, 56)
    changes = [(change["step"], change["old"], change["new"]) for change in state.changes]
    assert changes == [(6, 4, 8), (8, 8, 2)]
    monkeypatch.chdir(folders / "resized")
    expected = {"--step 3": "12..15", "--step 7": "28..35", "--batch 8": "36..43", "--step 10": "54..55"}
    for chosen, numbers in (expected | {"--batch 13": "58..59"}).items():
        shown = call_tool("show_batch", "run", *chosen.split(), "--blocks", 1).stdout
        assert f": sequences {numbers}, stream " in shown, (chosen, shown)
        assert f"\nsequence {numbers.split('.')[0]} " in shown


def test_an_old_export_generates_an_image_and_keeps_its_weights_when_exported_again(tmp_path):
    """Of commit ad3992f: imported and exported again it has the same bytes of weights."""
    with tarfile.open(Path(__file__).with_name("ad3992f-export.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    export = tmp_path / "old-export"
    [image] = Generator.load(export).images(["a b"], Sampling(temperature=0))
    assert len(image.codes) == Vocabulary.load(export).image_tokens
    checkpoint, comparison = import_export(export, tmp_path / "run")
    assert comparison.passed
    export_checkpoint(checkpoint, export, tmp_path / "again")
    again = tmp_path / "again"
    assert (again / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((again / name).read_text()) == json.loads((export / name).read_text()), name
