"""Texts, images and pairs for training: the usable parts of every input, and counts of the rest."""

import argparse
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cm3leon.data.preprocess.raw_inputs import ImageLoader, RawInputs, add_input_options
from megatron_cm3leon.data.sources import read_image_bytes
from tests.data.sources.test_fields import write_lines
from tests.data.sources.test_sources import FILES, make_image, pairs_folder  # noqa: F401 (a fixture)
from tests.data.tasks.instructions import write_rows


def list_names(images):
    return [image.name for image in images]


def test_every_format_gives_the_same_texts_images_and_pairs(pairs_folder):  # noqa: F811
    expected = None
    for name in FILES:
        texts, images, pairs = (RawInputs(pairs_folder / name, part=part) for part in ("texts", "images", "pairs"))
        found = (
            list(texts.texts()),
            [read_image_bytes(image) for image in images.images()],
            [(pair.caption, read_image_bytes(pair.images[0])) for pair in pairs.pairs()],
        )
        expected = expected or found
        assert found == expected and len(found[2]) == 6, name
        assert [inputs.explain_skipped() for inputs in (texts, images, pairs)] == [""] * 3


def test_incomplete_pairs_are_used_where_only_the_text_or_the_image_is_needed(tmp_path):
    rows = [{"image": "0.png"}, {"caption": "a"}, {"image": "1.png", "caption": " "}, {"text": "b"}, {"title": "c"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    texts, images, pairs = (RawInputs(path, part=part) for part in ("texts", "images", "pairs"))
    assert list(texts.texts()) == ["a", "b"] and list_names(images.images()) == ["0.png", "1.png"]
    assert texts.explain_skipped().startswith('3 of 5 inputs were skipped: 1 x field "caption" is missing (the first: ')
    assert "1 x empty caption" in texts.explain_skipped() and "1 x no image" in images.explain_skipped()
    assert list(pairs.pairs()) == [] and pairs.reasons.total == pairs.read == 5


def test_members_of_tars_without_captions_or_images_are_read(tmp_path):
    for name, content in (("0.png", make_image()), ("1.txt", b"alone")):
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("0.png", "1.txt"):
            tar.add(tmp_path / name, name)
    assert list(RawInputs(tmp_path / "x.tar", part="texts").texts()) == ["alone"]
    assert [read_image_bytes(image) for image in RawInputs(tmp_path / "x.tar", part="images").images()] == [
        make_image()
    ]


def test_folders_of_only_images_or_only_texts_are_read(tmp_path):
    """Neither contains a pair; a tokenizer can be trained on both."""
    for name in ("images/b.png", "images/a.JPG", "images/sub/c.webp", "images/notes.md", "images/alone.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a separate text\n")
    images = RawInputs(tmp_path / "images", part="images")
    assert list_names(images.images()) == ["a.JPG", "b.png", "sub/c.webp"]
    assert "1 x no image beside a caption" in images.explain_skipped()
    assert list(RawInputs(tmp_path / "images", part="texts").texts()) == ["a separate text"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("one\n")
    assert list(RawInputs(tmp_path / "texts", part="texts").texts()) == ["one\n"]


def test_interleaved_documents_and_plain_lines_are_read(tmp_path):
    segments = [{"text": "a"}, {"image": "0.png"}, {"text": "b"}, {"image": "1.png"}]
    path = write_lines(tmp_path / "rows.jsonl", [{"segments": segments}])
    assert list(RawInputs(path, part="texts").texts()) == ["a", "b"]
    assert list_names(RawInputs(path, part="images").images()) == ["0.png", "1.png"]
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert list(RawInputs(tmp_path / "lines.txt", part="texts").texts()) == ["one", "two"]
    with pytest.raises(ValueError, match=r"lines.txt: no image in its 2 inputs: 2 x no image\."):
        RawInputs(tmp_path / "lines.txt", part="images").images()


def test_embedded_images_beyond_the_memory_limit_are_skipped_evenly(tmp_path):
    rows = [{"image": make_image(n), "caption": "c"} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    inputs = RawInputs(tmp_path / "x.parquet", part="images")
    kept = [read_image_bytes(image) for image in inputs.images(kept_bytes=12 * len(make_image()))]
    assert kept == [make_image(n) for n in range(0, 40, 4)]
    assert "30 of 40 inputs were skipped: 30 x more images than fit into memory" in inputs.explain_skipped()


def test_the_reason_for_an_image_is_counted_once(tmp_path):
    (tmp_path / "bad.png").write_text("not an image")
    path = write_lines(tmp_path / "rows.jsonl", [{"image": name, "caption": "c"} for name in ("none.png", "bad.png")])
    inputs, load = RawInputs(path, part="images"), ImageLoader()
    for image in inputs.images() * 2:
        with pytest.raises(ValueError, match="picture: "):
            load(image)
    load.add_to(inputs.reasons)
    assert inputs.explain_skipped().startswith("2 of 2 inputs were skipped: 1 x unreadable picture (the first: bad.png")


def test_a_missing_input_is_refused_and_inputs_have_names(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        RawInputs(tmp_path / "missing.jsonl")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "one"}))
    assert RawInputs(path).name == f"--input {path}" and RawInputs([path, path]).name == f"--input {path} ..."


def test_segments_and_images_of_instruction_documents_are_read(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"image": "a.png", "instruction": "whiten", "edited": "b.png"}] * 2)
    parser = argparse.ArgumentParser()
    add_input_options(parser, tasks=True)
    arguments = parser.parse_args(["--input", str(path), "--task", "edit"])
    texts, images = (RawInputs.open(arguments, part) for part in ("texts", "images"))
    assert list(texts.texts()) == ["Edit first image following the instruction", "whiten"] * 2
    assert list_names(images.images()) == ["a.png", "b.png"]
    write_rows(path, [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    arguments = parser.parse_args(["--input", str(path), "--format", "llava"])
    assert list(RawInputs.open(arguments, "texts").texts()) == ["User: a\nAssistant: b"]
    with pytest.raises(ValueError, match="--images is for instruction documents; give --task"):
        RawInputs.open(parser.parse_args(["--input", str(path), "--images", "x"]), "texts")
