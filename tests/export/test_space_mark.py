"""Text with U+2581, which SentencePiece uses for a space, is decoded exactly, everywhere."""

import json

import pytest
from PIL import Image
from transformers import AutoTokenizer

from megatron_cm3leon.data.preprocess.run import PreprocessOptions, preprocess
from megatron_cm3leon.data.shards.reader import open_shards, split_segments
from megatron_cm3leon.data.sources import open_source
from megatron_cm3leon.export import export_checkpoint
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.tokenizers.text import TextTokenizer
from tests.checkpoint.builders import family_config, write_random_checkpoint

TEXTS = [
    "\u2581",
    "\u2581 a \u2581\u2581b",
    " \u2581 ",
    "a small red circle\u2581",
    "a\u2581small \u2581red",
    "a small red",
]


@pytest.fixture(scope="module")
def export(tmp_path_factory, tokenizer, vocabulary):
    folder = tmp_path_factory.mktemp("space-mark")
    config = family_config("data.seq_length=64")
    export_checkpoint(write_random_checkpoint(folder / "run", config, vocabulary), tokenizer, folder / "export")
    return folder / "export"


def test_shards_and_their_metadata_keep_the_text(tmp_path, tokenizer, vocabulary):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    rows = [{"text": text} for text in TEXTS] + [{"image": "0.png", "caption": text} for text in TEXTS]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess(open_source(tmp_path / "x.jsonl", 5), PreprocessOptions(tokenizer=tokenizer, output=tmp_path / "out"))
    corpus, text = open_shards(tmp_path / "out"), TextTokenizer.load(tokenizer / "text.model")
    documents = [split_segments(corpus.read(number), vocabulary)[0] for number in range(len(rows))]
    assert [text.decode(ids) for ids in documents] == TEXTS * 2
    assert [ids.tolist() for ids in documents] == [text.encode(line) for line in TEXTS * 2]
    assert corpus.metadata(["caption"])["caption"].to_pylist()[-len(TEXTS) :] == TEXTS


def test_the_exported_tokenizer_keeps_the_text(export, tokenizer):
    stock, text = AutoTokenizer.from_pretrained(export), TextTokenizer.load(tokenizer / "text.model")
    for line in TEXTS:
        assert stock(line)["input_ids"] == text.encode(line)
        assert stock.decode(text.encode(line)) == line


def test_generation_keeps_the_text(export):
    generator = Generator.load(export, device="cpu")
    assert [generator.codec.text.decode(generator.codec.encode_document([line])) for line in TEXTS] == TEXTS
    texts = [(line, other) for line, other in zip(TEXTS, reversed(TEXTS), strict=True)]
    for (left, right), infilled in zip(texts, generator.infill_text(texts, longest=4), strict=True):
        assert infilled.startswith(left.rstrip()) and infilled.endswith(right.lstrip())  # spaces belong to the span
