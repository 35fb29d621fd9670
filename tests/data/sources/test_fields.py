"""Rows with fields: which field is the image, which fields are kept, and why a row cannot be used."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cm3leon.data.preprocess.document_reader import read_image
from megatron_cm3leon.data.sources import BadInput, Fields, RawPair, RawText, open_source, read_image_bytes
from megatron_cm3leon.data.sources.embedded import shorten
from tests.data.runs import check_counts, read_all, read_quarantine, run
from tests.data.sources.test_sources import make_image


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(folder, rows, **fields):
    return read_all(open_source(write_lines(folder / "rows.jsonl", rows), 10, fields=Fields(**fields)))


def test_file_name_is_the_image_if_it_has_an_image_extension(tmp_path, caplog):
    """As in the imagefolder format of Hugging Face; a text corpus may have this field too."""
    rows = [{"file_name": f"{n}.jpg", "text": f"caption {n}"} for n in range(2)]
    caplog.set_level("INFO", "megatron_cm3leon")
    pairs = read_rows(tmp_path, rows)
    assert [(type(pair), pair.image_name, pair.caption) for pair in pairs] == [
        (RawPair, f"{n}.jpg", f"caption {n}") for n in range(2)
    ]
    assert "rows.jsonl: field file_name is the image; --image-field chooses another." in caplog.text
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [pair.image_name for pair in read_all(open_source(tmp_path / "rows.parquet", 10))] == ["0.jpg", "1.jpg"]
    (tmp_path / "rows.csv").write_text("file_name,text\n0.JPG,a\n")
    assert read_all(open_source(tmp_path / "rows.csv", 10))[0].image_name == "0.JPG"
    text, pair = read_rows(tmp_path, [{"file_name": "a.txt", "text": "b"}, {"file_name": "0.png", "caption": "c"}])
    assert text.segments == ["b"] and text.extra == '{"file_name": "a.txt"}' and pair.image_name == "0.png"
    assert read_rows(tmp_path, [{"image": "1.png", "file_name": "0.png", "caption": "c"}])[0].image_name == "1.png"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_path", "0.jpg"), ("filename", "a/0.PNG"), ("images", ["0.jpg"]), ("img", {"path": "x.png"}),
        ("scan_file", "a.heic"), ("photo", "data:image/png;base64,aGk="), ("image_url", "http://a/b.webp"),
    ],
)  # fmt: skip
def test_an_image_next_to_a_text_is_not_ignored_silently(tmp_path, name, value):
    (bad,) = read_rows(tmp_path, [{name: value, "text": "a"}])
    assert bad.reason == (
        f'field "image" is missing: field "{name}" holds an image; give --image-field {name} --caption-field text for '
        f"pairs, or --image-field image for the texts alone"
    )
    assert bad.segments == ["a"]
    assert isinstance(read_rows(tmp_path, [{name: value, "text": "a"}], image="image")[0], RawText)
    if isinstance(value, str):
        assert isinstance(read_rows(tmp_path, [{name: value, "text": "a"}], image=name, caption="text")[0], RawPair)


def test_bytes_of_an_image_next_to_a_text_in_parquet_are_reported(tmp_path):
    for value in (make_image(), {"bytes": make_image(), "path": None}):
        pq.write_table(pa.Table.from_pylist([{"scan": value, "text": "a"}]), tmp_path / "x.parquet")
        (bad,) = read_all(open_source(tmp_path / "x.parquet", 10))
        assert 'field "scan" holds an image' in bad.reason


def test_texts_with_other_fields_stay_texts(tmp_path):
    rows = [
        {"text": "a", "url": "https://en.wikipedia.org/wiki/File:A.jpg", "timestamp": "2019"},
        {"text": "b", "title": "File:A.png", "id": 3, "path": "src/a.py", "images": [], "image_count": 2},
    ]
    assert [row.segments for row in read_rows(tmp_path, rows)] == [["a"], ["b"]]


def test_images_in_base64_are_read(tmp_path):
    content = make_image(7, "JPEG")
    plain = base64.b64encode(content).decode()
    wrapped = base64.encodebytes(make_image(7)).decode()
    urlsafe = base64.urlsafe_b64encode(make_image(9)).decode().rstrip("=")
    values = [f"data:image/jpeg;base64,{plain}", plain, f"DATA:image/png;charset=x;base64,{wrapped}", wrapped, urlsafe]
    pairs = read_rows(tmp_path, [{"image": value, "caption": "c", "mask": value} for value in values])
    assert [read_image_bytes(pair.images[0]) for pair in pairs] == [
        content,
        content,
        make_image(7),
        make_image(7),
        make_image(9),
    ]
    assert pairs[0].image_name == "00000000.image" and len(pairs[0].extra) < 200
    (document,) = read_rows(tmp_path, [{"segments": [{"text": "a"}, {"image": values[0]}]}])
    assert read_image_bytes(document.images[0]) == content
    manifest = run(tmp_path / "rows.jsonl", tmp_path / "out")
    assert check_counts(manifest) == (1, 1, 0, 0, 0) and manifest["kinds"] == {"interleaved": 1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("data:image/svg+xml,%3Csvg%3E", "is a data: URI that is not base64: data:image/svg+xml,%3Csvg%3E"),
        ("data:image/png;base64,@@@", "is a data: URI whose base64 is damaged: data:image/png;base64,@@@"),
        ("QUJD" * 3000, "has 12,000 characters, too many for a path, and is not base64 of an image: QUJD"),
    ],
)
def test_reasons_are_short_for_long_values(tmp_path, value, reason):
    rows = [{"image": value, "caption": "c"}, {"image": "data:image/png;base64," + 900 * "aGkh", "caption": "c"}]
    rows.append({"image": "x/" * 1500 + "y.jpg", "caption": "c"})
    with pytest.raises(ValueError, match=r"3 of the 3 inputs"):
        run(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    reasons = [bad["reason"] for bad in read_quarantine(tmp_path / "out")]
    assert reasons[0].startswith(f'field "image" {reason}') and max(map(len, reasons)) < 420
    assert reasons[1].startswith("unreadable picture: 00000001.image: ")


def test_shorten_keeps_both_ends_of_a_long_text():
    assert shorten("a" * 400) == "a" * 400
    assert shorten("a" * 300 + "b" * 300, 90) == "a" * 60 + " [...] " + "b" * 22


def test_binary_fields_are_not_copied_into_the_metadata(tmp_path):
    mask = make_image(3)
    row = {
        "image": make_image(), "caption": "c", "mask": mask, "md5": b"\0\1\xff", "pages": [{"bytes": mask}],
        "edited": {"bytes": mask, "path": "m.png"}, "embedding": [0.25] * 2000, "polygon": [[1, 2], [3, 4]],
        "note": "n" * 3000,
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (pair,) = read_all(open_source(tmp_path / "x.parquet", 10))
    extra = json.loads(pair.extra)
    assert extra["mask"] == extra["edited"]["bytes"] == extra["pages"][0]["bytes"]
    assert extra["mask"].startswith(f"{len(mask)} bytes, sha256 ") and len(extra["mask"]) < 90
    assert extra["md5"] == "0001ff" and extra["edited"]["path"] == "m.png" and extra["note"] == "n" * 3000
    assert extra["embedding"].startswith("2000 numbers, sha256 ") and extra["polygon"] == [[1, 2], [3, 4]]


def test_backslashes_in_a_path_are_reported(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/0.png").write_bytes(make_image())
    rows = [{"image": "a\\0.png", "caption": "c"}, {"image": "a/missing.png", "caption": "c"}]
    pairs = read_rows(tmp_path, rows)
    with pytest.raises(
        ValueError, match=r"missing picture: a\\0\.png: its path has backslashes, where this system has /"
    ):
        read_image(pairs[0].images[0])
    with pytest.raises(ValueError, match=r"missing picture: a/missing\.png$"):
        read_image(pairs[1].images[0])
    (tmp_path / "a\\0.png").write_bytes(make_image())
    assert read_image(pairs[0].images[0])[0].size == (10, 8)


def test_valid_segments_of_a_bad_row_are_kept_for_training_tokenizers(tmp_path):
    rows = [{"image": "0.png"}, {"caption": "a"}, {"image": "0.png", "caption": " "}, {"image": 3, "caption": "b"}, {}]
    found = read_rows(tmp_path, rows)
    assert all(isinstance(bad, BadInput) for bad in found)
    assert [[getattr(part, "name", part) for part in bad.segments] for bad in found] == [
        ["0.png"], ["a"], ["0.png"], ["b"], [],
    ]  # fmt: skip
    assert found[-1].reason == 'field "image" is missing: the fields are none'


ROW = '{"image": "0.png", "caption": "a"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[{ROW}, {ROW}]", "is one JSON array; one object per line is expected. Convert it: jq -c '.\\[\\]'"),
        (f"\ufeff [{ROW}]\n\n", "is one JSON array"),
        (f"[\n{ROW},\n{ROW}\n]", "is one JSON array"),
        ('[\n  {\n    "image": "0.png"\n  }\n]', "is one JSON array"),
        ('{\n  "image": "0.png",\n  "caption": "a"\n}\n{\n  "image"', "objects over several lines; one object"),
        ('{"image": "0.png",\n "caption": "a"}\n', "holds JSON objects over several lines"),
        (f'{{"info": {{}}, "images": [{ROW}]}}', r"is one JSON object for the whole file \(its fields: info, images\)"),
        (f'{{\n"info": {{}},\n"annotations": [{ROW}]\n}}', "is one JSON object for the whole file"),
        ('{"image": {"0": "0.png"}, "caption": {"0": "a"}}', "is one JSON object for the whole file"),
    ],
)  # fmt: skip
def test_json_that_is_not_one_object_per_line_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "x.json", 10)


@pytest.mark.parametrize("content", [f"[1]\n{ROW}", f"[{ROW}]\n{ROW}", f"{{cut\n{ROW}", f"{ROW}", '{"text": [{}]}', ""])
def test_damaged_lines_are_not_reported_as_another_format(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content + "\n")
    assert len(read_all(open_source(tmp_path / "x.jsonl", 10))) == content.count("\n") + 1 - (not content)


@pytest.mark.parametrize(
    ("content", "form"),
    [('{"text": "a"}\n', "jsonl"), ("image\tcaption\n0.jpg\ta\n", "csv"), ("id;image\n1;b\n", "csv")],
)
def test_a_text_file_with_fields_is_not_read_as_text(tmp_path, content, form):
    (tmp_path / "x.txt").write_text(content)
    with pytest.raises(ValueError, match=f"give --format {form} to read its fields, or --format lines"):
        open_source(tmp_path / "x.txt", 10)
    assert len(read_all(open_source(tmp_path / "x.txt", 10, "lines"))) == content.count("\n")
    assert not isinstance(read_all(open_source(tmp_path / "x.txt", 10, form))[0], RawText if form == "csv" else RawPair)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["jsonl", "txt", "csv"])
def test_the_error_names_an_encoding_other_than_utf_8(tmp_path, encoding, ending):
    (tmp_path / f"x.{ending}").write_bytes('image,caption,{"text": "one"}\n'.encode(encoding))
    name = encoding.upper().replace("-", "").replace("UTF", "UTF-").replace("16LE", "16LE")
    with pytest.raises(ValueError, match=f"x.{ending} is {name}, not UTF-8; convert it: iconv -f {name} -t UTF-8"):
        open_source(tmp_path / f"x.{ending}", 10)
