"""Texts, images and pairs for training: what is sound of every input, and counts of the rest."""

import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cm3leon.data.preprocess.raw_inputs import ImageLoader, RawInputs
from megatron_cm3leon.data.sources import read_image_bytes
from tests.data.sources.test_fields import write_lines
from tests.data.sources.test_sources import FORMS, forms, picture  # noqa: F401 (a fixture)


def names_of(images):
    return [image.name for image in images]


def test_every_format_gives_the_same_texts_images_and_pairs(forms):  # noqa: F811
    expected = None
    for name in FORMS:
        texts, images, pairs = (RawInputs(forms / name, part=part) for part in ("texts", "images", "pairs"))
        found = (
            list(texts.texts()),
            [read_image_bytes(image) for image in images.images()],
            [(pair.caption, read_image_bytes(pair.images[0])) for pair in pairs.pairs()],
        )
        expected = expected or found
        assert found == expected and len(found[2]) == 6, name
        assert [inputs.explain_skipped() for inputs in (texts, images, pairs)] == [""] * 3


def test_half_a_pair_is_enough_where_only_that_half_is_needed(tmp_path):
    rows = [{"image": "0.png"}, {"caption": "a"}, {"image": "1.png", "caption": " "}, {"text": "b"}, {"title": "c"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    texts, images, pairs = (RawInputs(path, part=part) for part in ("texts", "images", "pairs"))
    assert list(texts.texts()) == ["a", "b"] and names_of(images.images()) == ["0.png", "1.png"]
    assert texts.explain_skipped().startswith('3 of 5 inputs were skipped: 1 x field "caption" is missing (the first: ')
    assert "1 x empty caption" in texts.explain_skipped() and "1 x no image" in images.explain_skipped()
    assert list(pairs.pairs()) == [] and pairs.reasons.total == pairs.read == 5


def test_tars_without_captions_or_images(tmp_path):
    for name, content in (("0.png", picture()), ("1.txt", b"alone")):
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("0.png", "1.txt"):
            tar.add(tmp_path / name, name)
    assert list(RawInputs(tmp_path / "x.tar", part="texts").texts()) == ["alone"]
    assert [read_image_bytes(image) for image in RawInputs(tmp_path / "x.tar", part="images").images()] == [picture()]


def test_a_folder_of_images_and_one_of_texts(tmp_path):
    """Neither has a pair; both are what a tokenizer is trained on."""
    for name in ("images/b.png", "images/a.JPG", "images/sub/c.webp", "images/notes.md", "images/alone.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a text of its own\n")
    images = RawInputs(tmp_path / "images", part="images")
    assert names_of(images.images()) == ["a.JPG", "b.png", "sub/c.webp"]
    assert "1 x no image beside a caption" in images.explain_skipped()
    assert list(RawInputs(tmp_path / "images", part="texts").texts()) == ["a text of its own"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("one\n")
    assert list(RawInputs(tmp_path / "texts", part="texts").texts()) == ["one\n"]


def test_interleaved_documents_and_plain_lines(tmp_path):
    segments = [{"text": "a"}, {"image": "0.png"}, {"text": "b"}, {"image": "1.png"}]
    path = write_lines(tmp_path / "rows.jsonl", [{"segments": segments}])
    assert list(RawInputs(path, part="texts").texts()) == ["a", "b"]
    assert names_of(RawInputs(path, part="images").images()) == ["0.png", "1.png"]
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert list(RawInputs(tmp_path / "lines.txt", part="texts").texts()) == ["one", "two"]
    with pytest.raises(ValueError, match=r"lines.txt: no image in its 2 inputs: 2 x no image\."):
        RawInputs(tmp_path / "lines.txt", part="images").images()


def test_of_images_without_files_an_even_share_stays(tmp_path):
    rows = [{"image": picture(n), "caption": "c"} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    inputs = RawInputs(tmp_path / "x.parquet", part="images")
    kept = [read_image_bytes(image) for image in inputs.images(kept_bytes=12 * len(picture()))]
    assert kept == [picture(n) for n in range(0, 40, 4)]
    assert "30 of 40 inputs were skipped: 30 x more images than fit into memory" in inputs.explain_skipped()


def test_the_reasons_of_images_are_counted_once(tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    path = write_lines(tmp_path / "rows.jsonl", [{"image": name, "caption": "c"} for name in ("gone.png", "bad.png")])
    inputs, load = RawInputs(path, part="images"), ImageLoader()
    for image in inputs.images() * 2:
        with pytest.raises(ValueError, match="picture: "):
            load(image)
    load.add_to(inputs.reasons)
    assert inputs.explain_skipped().startswith("2 of 2 inputs were skipped: 1 x unreadable picture (the first: bad.png")


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        RawInputs(tmp_path / "gone.jsonl")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "one"}))
    assert RawInputs(path).name == f"--input {path}" and RawInputs([path, path]).name == f"--input {path} ..."
