"""A small corpus of shapes as shards, a text model and an untrained CLIP, shared by the retrieval tests."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.shapes import generate
from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.data.shards.reader import MANIFEST, build_manifest
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.retrieval.encoder import TEXT_MODEL, build_tiny_clip, save_clip
from megatron_cm3leon.tokenizers.text import TextTokenizer, train_text
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from tests.data.corpora import make_vocabulary


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Folder with train.jsonl (180 pairs) and heldout.jsonl (20)."""
    folder = tmp_path_factory.mktemp("shapes")
    generate.generate(folder, 200, 32, 0)
    return folder


@pytest.fixture(scope="session")
def text_model(shapes, tmp_path_factory) -> Path:
    lines = (shapes / "train.jsonl").read_text().splitlines()
    path = tmp_path_factory.mktemp("text") / TEXT_MODEL
    train_text((json.loads(line)["caption"] for line in lines), 320).save(path)
    return path


@pytest.fixture(scope="session")
def clip_folder(text_model, tmp_path_factory) -> Path:
    """A CLIP folder with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = TextTokenizer.load(text_model)
    tokenizer.save(folder / TEXT_MODEL)
    torch.manual_seed(0)
    save_clip(build_tiny_clip(tokenizer.size, 32, 16, 32, 1), folder)
    return folder


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return make_vocabulary(text=320, image=256, height=2, width=2, sentinels=8, specials=16)


@pytest.fixture(scope="session")
def write_shards(text_model, vocabulary):
    """Function (jsonl, folder, vocabulary=...) that writes the pairs as two shards; codes depend on the image."""
    tokenizer = TextTokenizer.load(text_model)

    def write(jsonl: Path, folder: Path, vocabulary: Vocabulary = vocabulary) -> Path:
        folder.mkdir(parents=True)
        lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
        entries = []
        for part, rows in enumerate((lines[: len(lines) // 2], lines[len(lines) // 2 :])):
            writer = ShardWriter(folder, f"shard-{part:06d}-000", vocabulary)
            for number, fields in enumerate(rows):
                content = (jsonl.parent / fields["image"]).read_bytes()
                checksum = hashlib.sha256(content).digest()
                codes = vocabulary.image_start + np.frombuffer(checksum[:4], np.uint8).astype(np.int64)
                ids = np.concatenate([tokenizer.encode(fields["caption"]), [vocabulary.break_id], codes])
                metadata = {"caption": fields["caption"], "image": fields["image"], "source": jsonl.name}
                metadata |= {"picture_sha256": checksum.hex(), "extra": "{}"}
                writer.add(f"{part}{number:06d}", ids, metadata)
            entries.append(writer.close())
        manifest = build_manifest(vocabulary, entries, input=str(jsonl.parent), image_size=32)
        write_json(folder / MANIFEST, manifest)
        return folder

    return write


@pytest.fixture(scope="session")
def shards(shapes, write_shards, tmp_path_factory) -> Path:
    """The 180 training pairs."""
    return write_shards(shapes / "train.jsonl", tmp_path_factory.mktemp("train") / "shards")


@pytest.fixture(scope="session")
def heldout_shards(shapes, write_shards, tmp_path_factory) -> Path:
    """The 20 held-out pairs."""
    return write_shards(shapes / "heldout.jsonl", tmp_path_factory.mktemp("heldout") / "shards")
