"""A tiny random exported model, held-out shards, an index and a checker, all in real files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.data.shards.reader import build_manifest, open_shards
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.retrieved import DocumentSource
from tests.data.corpora import make_vocabulary
from tests.models import make_tokenizers, save_random_opt

WORDS = ["dark", "light", "picture", "a"]
VOCABULARY = make_vocabulary(text=len(WORDS), image=8, height=2, width=2, sentinels=2, specials=6)
CHECKER = """
def classify(image):
    return {"tone": "light" if sum(image.convert("L").tobytes()) > 4 * 128 else "dark"}

def parse_caption(text):
    found = [word for word in text.split() if word in ("dark", "light")]
    return {"tone": found[0]} if len(found) == 1 else None
"""


class FakeEncoder:
    """Vectors from the brightness of an image, or from the tone that a text names."""

    def encode_texts(self, texts):
        return np.array([[1.0, 0.0] if "light" in text else [0.0, 1.0] for text in texts], np.float32)

    def encode_images(self, images):
        light = np.array([np.asarray(image.convert("L")).mean() / 255 for image in images], np.float32)
        return np.stack([light, 1 - light], 1)


class FakeRetriever:
    """Always finds the same documents of its bank."""

    def __init__(self, bank):
        self.bank, self.encoder = bank, FakeEncoder()
        self.data = SimpleNamespace(vectors=np.full((bank.documents, 2), 0.5, np.float16))

    def search(self, texts=None, images=None, k=2):
        return np.tile(np.arange(k), (len(texts if texts is not None else images), 1))


def write_shards(folder, count, seed):
    """`count` pairs with gray images, whose files are in a folder next to the shards."""
    random = np.random.default_rng(seed)
    images = folder.parent / f"{folder.name}-images"
    folder.mkdir(parents=True)
    images.mkdir()
    writer = ShardWriter(folder, "shard-00000-0", VOCABULARY)
    for number in range(count):
        light = number % 2
        codes = random.integers(4, 8, 4) if light else random.integers(0, 3, 4)
        Image.fromarray((codes.reshape(2, 2) * 36).astype(np.uint8)).save(images / f"{number}.png")
        caption = f"a {WORDS[light]} picture"
        ids = [3, light, 2, VOCABULARY.break_id, *(VOCABULARY.image_start + codes)]
        fields = {"caption": caption, "image": f"{number}.png", "source": "", "picture_sha256": "", "extra": "{}"}
        writer.add(f"{number:06d}", np.array(ids), fields)
    write_json(folder / "manifest.json", build_manifest(VOCABULARY, [writer.close()], input=str(images)))
    return folder


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Folders model, shards and bank, and a checker file; tokenizers and retriever are fakes."""
    model = tmp_path / "model"
    save_random_opt(model, VOCABULARY, hidden_size=16, positions=40)
    metadata = {"max_abs_logit_diff": 0.0, "training": {"retrieved_documents": 2}}
    (model / "cm3leon.json").write_text(json.dumps(metadata))
    generator = Generator(Decoder.load(model), make_tokenizers(WORDS, VOCABULARY), metadata["training"])
    monkeypatch.setattr(Generator, "load", classmethod(lambda *_: generator))
    checker = tmp_path / "checker.py"
    checker.write_text(CHECKER)
    shards, bank = write_shards(tmp_path / "heldout", 20, 1), write_shards(tmp_path / "bank", 6, 2)
    return SimpleNamespace(
        path=tmp_path,
        model=model,
        shards=shards,
        bank=bank,
        checker=checker,
        generator=generator,
        source=DocumentSource(FakeRetriever(open_shards(bank))),
    )
