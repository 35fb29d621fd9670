"""tools/build_index.py: the command line, the line that it prints, its exit statuses."""

import hashlib
import json

import numpy as np
import pytest

from examples.shapes import generate
from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.data.shards.reader import MANIFEST, build_manifest
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.retrieval.encoder import build_tiny_clip, save_clip
from megatron_cm3leon.tokenizers.text import train_text
from tests.data.corpora import make_vocabulary
from tests.tools.call import call_tool


@pytest.fixture
def corpus(tmp_path):
    """18 documents as shards, and an untrained CLIP."""
    generate.generate(tmp_path / "raw", 20, 32, 0)
    lines = [json.loads(line) for line in (tmp_path / "raw/train.jsonl").read_text().splitlines()]
    (tmp_path / "clip").mkdir()
    text = train_text((fields["caption"] for fields in lines), 300)
    text.save(tmp_path / "clip/text.model")
    save_clip(build_tiny_clip(300, 32, 16, 32, 1), tmp_path / "clip")
    vocabulary = make_vocabulary(text=300, image=16, height=1, width=2, sentinels=4, specials=8)
    (tmp_path / "shards").mkdir()
    writer = ShardWriter(tmp_path / "shards", "shard-000000-000", vocabulary)
    for number, fields in enumerate(lines):
        checksum = hashlib.sha256((tmp_path / "raw" / fields["image"]).read_bytes()).hexdigest()
        codes = vocabulary.image_start + np.array([number % 16, number // 16])
        ids = np.concatenate([text.encode(fields["caption"]), [vocabulary.break_id], codes])
        metadata = {"caption": fields["caption"], "image": fields["image"], "source": "", "extra": "{}"}
        writer.add(f"{number:08d}", ids, metadata | {"picture_sha256": checksum})
    manifest = build_manifest(vocabulary, [writer.close()], input=str(tmp_path / "raw"), image_size=32)
    write_json(tmp_path / "shards" / MANIFEST, manifest)
    return tmp_path


def test_an_index_is_built_and_reported_and_a_second_build_is_refused(corpus):
    arguments = ["--shards", corpus / "shards", "--encoder", corpus / "clip", "--output", corpus / "index"]
    done = call_tool("build_index", *arguments, "--neighbors", 2, "--threshold", 0.9999)
    assert done.returncode == 0, done.stderr
    assert "18 documents" in done.stdout and "of 2 neighbors each" in done.stdout and "recall@10 1.000" in done.stdout
    assert json.loads((corpus / "index/index.json").read_text())["neighbors"] == 2
    done = call_tool("build_index", *arguments)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: ") and "already holds a finished index" in done.stderr


def test_tasks_share_the_work(corpus, monkeypatch):
    arguments = ["--shards", corpus / "shards", "--encoder", corpus / "clip", "--output", corpus / "index"]
    arguments += ["--neighbors", 2, "--threshold", 0.9999]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    done = call_tool("build_index", *arguments)
    assert done.returncode == 0
    assert "task 1 of 2 is done; after the last task run the same command as one task" in done.stdout
    assert not (corpus / "index/embeddings/bank.npy").exists()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    done = call_tool("build_index", *arguments, "--stage", "neighbors")
    assert done.returncode == 2 and "1 of 1 parts of" in done.stderr  # task 0 has the only part
    done = call_tool("build_index", *arguments, "--task-id", 0, "--num-tasks", 2)
    assert done.returncode == 0, done.stderr
    done = call_tool("build_index", *arguments, "--stage", "neighbors")
    assert done.returncode == 2 and "has no index.faiss yet; run --stage index" in done.stderr
    done = call_tool("build_index", *arguments, "--task-id", 1, "--num-tasks", 2, "--stage", "index")
    assert done.returncode == 2 and "--stage index runs as one task" in done.stderr
    done = call_tool("build_index", *arguments)
    assert done.returncode == 0 and "18 documents" in done.stdout
    done = call_tool("build_index", *arguments, "--overwrite", "--stage", "encode")
    assert done.returncode == 2 and "--overwrite would remove what other tasks or stages wrote" in done.stderr


def test_a_factory_that_cannot_add_vectors_is_a_usage_error(corpus):
    arguments = ["--shards", corpus / "shards", "--encoder", corpus / "clip", "--output", corpus / "index"]
    done = call_tool("build_index", *arguments, "--factory", "IDMap,Flat")
    assert done.returncode == 2 and "error: index factory 'IDMap,Flat' (search '') is not valid for" in done.stderr
    done = call_tool("build_index", *arguments)  # the embeddings are kept
    assert done.returncode == 0, done.stderr


def test_help_shows_defaults():
    done = call_tool("build_index", "--help")
    assert done.returncode == 0
    assert "(default: 0.9)" in done.stdout and "(default: 8)" in done.stdout


def test_the_former_name_of_an_option_is_accepted_and_hidden(tmp_path):
    arguments = ["--shards", tmp_path, "--encoder", tmp_path, "--output", tmp_path / "index"]
    done = call_tool("build_index", *arguments, "--pictures", "tokens")
    assert done.returncode == 2 and "--images tokens requires --tokenizer" in done.stderr
    assert "--pictures" not in call_tool("build_index", "--help").stdout


def test_missing_shards_are_a_usage_error(tmp_path):
    done = call_tool("build_index", "--shards", tmp_path, "--encoder", tmp_path, "--output", tmp_path / "index")
    assert done.returncode == 2
    assert "error: no shards at" in done.stderr
    assert not (tmp_path / "index").exists()
