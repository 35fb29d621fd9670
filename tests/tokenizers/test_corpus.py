"""Captions and pictures of both input forms."""

import pytest

from megatron_cm3leon.tokenizers.corpus import list_pictures, read_captions


def test_jsonl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"image": "a/1.png", "caption": "é  one", "extra": 1}\n\n{"image": "2.png", "caption": ""}\n')
    assert list(read_captions(path)) == ["é  one", ""]
    assert list_pictures(path) == [tmp_path / "a/1.png", tmp_path / "2.png"]


def test_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("caption b\n")
    (tmp_path / "a.txt").write_text(" caption a")
    assert list(read_captions(tmp_path)) == [" caption a", "caption b"]
    assert list_pictures(tmp_path) == [tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "sub/c.webp"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{broken\n", r"pairs\.jsonl:1: not a line of JSON"),
        ('{"image": "1.png", "caption": "x"}\n{"image": "1.png"}\n', r'pairs\.jsonl:2: needs a text field "caption"'),
        ("[1, 2]\n", r"pairs\.jsonl:1: needs a text field"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_captions(tmp_path / "pairs.jsonl"))


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give a JSONL file"):
        list(read_captions(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="holds no pictures"):
        list_pictures(tmp_path)
