"""Files of captions and references: the forms that are read, and one sentence for each bad one."""

import json

import pytest

from megatron_cm3leon.evaluation.caption_files import (
    match_images,
    read_captions,
    read_references,
    write_coco_results,
)


@pytest.fixture
def write(tmp_path):
    """A function that writes a file: a list as JSON Lines, a text as it is, anything else as JSON."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list) and name.endswith("l"):
            content = "\n".join(json.dumps(line) for line in content) + "\n"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_coco_and_json_lines_hold_the_same(write):
    rows = [{"image_id": 7, "caption": "a dog"}, {"image_id": 12, "caption": ""}]
    expected = {"7": "a dog", "12": ""}
    lines = [{"id": "7", "caption": "a dog"}, {"image": "12", "caption": ""}]
    assert read_captions(write("a.json", rows)) == read_captions(write("a.jsonl", lines)) == expected

    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(
        [(7, "a dog"), (12, "the sea"), (7, "one dog")])]  # fmt: skip
    coco = read_references(write("r.json", {"images": [{"id": 7}, {"id": 12}], "annotations": annotations}))
    lines = [{"image_id": 7, "captions": ["a dog", "one dog"], "image": "x/7.png"}, {"id": "12", "caption": "the sea"}]
    listed = read_references(write("r.jsonl", lines))
    assert coco.captions == listed.captions == {"7": ["a dog", "one dog"], "12": ["the sea"]}
    assert {key: path.parts[-2:] for key, path in listed.images.items()} == {"7": ("x", "7.png")}


def test_references_beside_a_caption_of_training_are_read(write):
    icon = {"image": "images/cif/bb.png", "caption": "flag: Barbados, CoreUI", "references": ["flag: Barbados", "flag"]}
    both = {"id": 7, "captions": ["a dog"], "references": ["an animal"], "caption": "dog!"}
    listed = read_references(write("r.jsonl", [icon, both]))
    assert listed.captions == {"images/cif/bb.png": ["flag: Barbados", "flag"], "7": ["a dog"]}
    with pytest.raises(ValueError, match=r"line 1 of .*r.jsonl has references 'flag'; a list of at least one text is"):
        read_references(write("r.jsonl", [icon | {"references": "flag"}]))
    with pytest.raises(ValueError, match=r"line 1 of .*r.jsonl has references 3; a text is required"):
        read_references(write("r.jsonl", [icon | {"references": ["flag", 3]}]))


def test_results_are_written_as_coco_has_them(tmp_path):
    write_coco_results(tmp_path / "a.json", {"7": "a", "12": "b"})
    assert json.loads((tmp_path / "a.json").read_text()) == [
        {"image_id": 7, "caption": "a"},
        {"image_id": 12, "caption": "b"},
    ]
    write_coco_results(tmp_path / "b.json", {"007": "a", "12": "b"})
    assert read_captions(tmp_path / "b.json") == {"007": "a", "12": "b"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "has no captions; COCO's JSON or JSON Lines"),
        ("a.json", "[]", "has no captions"),
        ("a.jsonl", '{"image_id": 1, "caption": "a"}\n{"image', r"line 2 of .*a.jsonl is not valid JSON"),
        ("a.json", {"annotations": []}, "has annotations, so it holds references; give it as --references"),
        ("a.json", ["a dog"], "entry 0 of .* is \"a dog\"; an object with image_id and caption is required"),
        ("a.jsonl", [{"caption": "a"}], "line 1 of .* has the image id None; image_id must be a text or a"),
        ("a.json", '[{"image_id": NaN, "caption": "a"}]', "has the image id nan"),
        ("a.json", '[{"image_id": 1, "caption": NaN}]', "entry 0 of .* has caption nan; a text is required"),
        ("a.jsonl", [{"id": 1, "caption": "a"}, {"id": "1", "caption": "b"}], "line 2 of .* second caption for .*'1'"),
    ],
)  # fmt: skip
def test_bad_captions(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_captions(write(name, content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", {"annotations": []}, "has no annotations; references of images are required"),
        ("r.json", {"annotations": {}}, "annotations of .* must be a list of objects"),
        ("r.json", {"annotations": [{"id": 1, "category_id": 2}]}, "annotation 0 of .* has no image_id"),
        ("r.json", {"images": [{"id": 1}, {"id": 1}], "annotations": []}, r"images of .* 1 ids more than once \(1\)"),
        ("r.jsonl", [{"id": 1, "captions": []}], r"line 1 of .* has captions \[\]; a list of at least one text"),
        ("r.jsonl", [{"id": 1, "captions": ["a", 2]}], "line 1 of .* has captions 2; a text is required"),
        ("r.jsonl", [{"id": 1, "caption": "a"}] * 2, "line 2 of .* has the image '1' for a second time; .*in one line"),
    ],
)  # fmt: skip
def test_bad_references(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_references(write(name, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file at .*none.json"):
        read_captions(tmp_path / "none.json")
    (tmp_path / "latin.jsonl").write_bytes('{"id": 1, "caption": "é"}'.encode("latin1"))
    with pytest.raises(ValueError, match=r"not UTF-8: byte 22 of .*latin.jsonl"):
        read_captions(tmp_path / "latin.jsonl")


def test_images_must_match():
    references = {"1": ["a"], "2": ["b"], "3": ["c"]}
    assert match_images({"2": "x", "1": "y", "3": "z"}, references, False) == ["1", "2", "3"]
    assert match_images({"3": "x", "1": "y"}, references, True) == ["1", "3"]
    with pytest.raises(ValueError, match=r"1 of 3 images have no caption \(2\); add captions, or give --allow-missing"):
        match_images({"3": "x", "1": "y"}, references, False)
    with pytest.raises(ValueError, match=r"2 of 3 captions are of images without references \(8, 9\)"):
        match_images({"8": "x", "9": "y", "1": "z"}, references, True)
