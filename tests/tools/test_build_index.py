"""tools/build_index.py: the command line, its one line of result, its exit statuses."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.shapes import generate  # noqa: E402
from megatron_cm3leon.cli import run_tool  # noqa: E402
from megatron_cm3leon.data.shards import MANIFEST, ShardWriter, build_manifest, write_json  # noqa: E402
from megatron_cm3leon.retrieval.encoder import build_tiny_clip, save_clip  # noqa: E402
from megatron_cm3leon.tokenizers.text import train_text  # noqa: E402
from megatron_cm3leon.tokenizers.vocab import Vocabulary  # noqa: E402


@pytest.fixture
def run(monkeypatch, capsys):
    """Function that runs the tool in this process: (exit status, stdout, stderr)."""
    specification = importlib.util.spec_from_file_location("build_index_tool", ROOT / "tools/build_index.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["build_index.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_tool(tool.main)
        return (ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def corpus(tmp_path):
    """Ten documents as shards, and an untrained CLIP."""
    generate.generate(tmp_path / "raw", 20, 32, 0)
    lines = [json.loads(line) for line in (tmp_path / "raw/train.jsonl").read_text().splitlines()]
    (tmp_path / "clip").mkdir()
    text = train_text((fields["caption"] for fields in lines), 300)
    text.save(tmp_path / "clip/text.model")
    save_clip(build_tiny_clip(300, 32, 16, 32, 1), tmp_path / "clip")
    sizes = {"text_size": 300, "image_size": 16, "sentinels": 4, "specials": 8, "image_height": 1, "image_width": 2}
    vocabulary = Vocabulary(**sizes, text_sha256="text", image_sha256="image")
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


def test_builds_says_so_and_refuses_a_second_time(corpus, run):
    arguments = ["--shards", corpus / "shards", "--encoder", corpus / "clip", "--output", corpus / "index"]
    status, out, err = run(*arguments, "--neighbors", 2, "--threshold", 0.9999)
    assert status == 0, err
    assert "18 documents" in out and "of 2 neighbours each" in out and "recall@10 1.000" in out
    assert json.loads((corpus / "index/index.json").read_text())["neighbors"] == 2
    status, _, err = run(*arguments)
    assert status == 2
    assert err.strip().startswith("error: ") and "already holds a finished index" in err


def test_help_shows_defaults(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "(default: 0.9)" in out and "(default: 8)" in out


def test_missing_shards(tmp_path, run):
    status, _, err = run("--shards", tmp_path, "--encoder", tmp_path, "--output", tmp_path / "index")
    assert status == 2
    assert "error: no shards at" in err
    assert not (tmp_path / "index").exists()
