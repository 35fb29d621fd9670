"""Tables as programs write them: separators, spaces, headers, and types that Python does not have."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cm3leon.data.sources import Fields, open_source
from tests.data.runs import read_all
from tests.data.sources.test_sources import make_image

ROWS = [("0.jpg", 'a "b", c; d| e\tf'), ("1.jpg", "two\nlines"), ("2.jpg", " x ")]


def write_csv(path, separator, head="", end="\r\n", names=("image", "caption")):
    quoted = [separator.join('"' + value.replace('"', '""') + '"' for value in row) for row in ROWS]
    path.write_bytes((head + end.join([separator.join(names), *quoted]) + end).encode())
    return path


@pytest.mark.parametrize("head", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|", ", ", "; "])
def test_separators_are_found_in_the_header(tmp_path, separator, ending, head):
    for names in (("image", "caption"), ('"image"', '"caption"')):
        path = write_csv(tmp_path / f"x.{ending}", separator, head, names=names)
        for size in (1, 2, 10):
            assert [(pair.image_name, pair.caption) for pair in read_all(open_source(path, size))] == ROWS, names


def test_a_declared_separator_is_used(tmp_path):
    """As by the line sep=; of Excel, also for an unusual separator."""
    for separator, head in ((";", "sep=;\r\n"), ("^", "\ufeffsep=^\n"), (",", '"sep=,"\r\n')):
        path = write_csv(tmp_path / "x.csv", separator, head)
        for size in (1, 10):
            pairs = read_all(open_source(path, size))
            assert [(pair.image_name, pair.caption) for pair in pairs] == ROWS and pairs[0].source == "x.csv:record 1"


def test_an_unexpected_separator_is_logged(tmp_path, caplog):
    caplog.set_level("INFO", "megatron_cm3leon")
    open_source(write_csv(tmp_path / "a.csv", ","), 10)
    open_source(write_csv(tmp_path / "a.tsv", "\t"), 10)
    assert not caplog.records
    open_source(write_csv(tmp_path / "b.csv", "; "), 10)
    assert "b.csv: the separator of its columns (the delimiter) is a semicolon and space." in caplog.text


def test_spaces_in_values_are_kept_if_the_header_has_none_after_separators(tmp_path):
    (tmp_path / "x.csv").write_text("image,caption,other column \n0.jpg, padded ,3\n")
    (pair,) = read_all(open_source(tmp_path / "x.csv", 10))
    assert pair.caption == " padded " and json.loads(pair.extra) == {"other column ": "3"}
    (tmp_path / "y.csv").write_text("image ,caption\n0.jpg,a\n")
    assert read_all(open_source(tmp_path / "y.csv", 10))[0].image_name == "0.jpg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a red square\t0.jpg\nb\t1.jpg\n", r"header has 2 columns, 'a red square', '0\.jpg', and none of them is"),
        ("image:caption\n0.jpg:a\n", r"is one column, 'image:caption', and none.*by comma, semicolon, tab or \|"),
        ("Image,Caption\n0.jpg,a\n", r"'Image', 'Caption', and none.*with other names, give --image-field"),
    ],
)  # fmt: skip
def test_a_header_without_a_known_column_is_refused(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "x.csv", 10)


def test_a_header_that_is_not_utf_8_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "x.csv").write_bytes("image,caption,qualité\n0.jpg,a,1\n".encode("cp1252"))
    with pytest.raises(ValueError, match="byte 20 of its header cannot be decoded; convert it, for example: iconv"):
        open_source(tmp_path / "x.csv", 10)


def test_column_names_that_are_given_determine_the_separator(tmp_path):
    (tmp_path / "x.csv").write_text("URL;TITLE\n0.jpg;a, b\n")
    (pair,) = read_all(open_source(tmp_path / "x.csv", 10, fields=Fields("URL", "TITLE")))
    assert (pair.image_name, pair.caption) == ("0.jpg", "a, b")


def test_values_without_a_python_type_are_kept_as_text(tmp_path):
    """Nanoseconds, years above 9999, unknown time zones; alone and inside structs and lists."""
    nanoseconds = pa.array([1234567891234567891, 1234567891000000000, None])
    columns = {
        "image": pa.array([make_image(n) for n in range(3)]),
        "caption": pa.array(["a", "b", "c"]),
        "crawled": nanoseconds.cast(pa.timestamp("ns")),
        "took": nanoseconds.cast(pa.duration("ns")),
        "far": pa.array([10**12] * 3).cast(pa.timestamp("s")),
        "zone": pa.array([5] * 3).cast(pa.timestamp("us", "Mars/Base")),
        "nested": pa.StructArray.from_arrays([nanoseconds.cast(pa.timestamp("ns")), pa.array([1, 2, 3])], ["at", "n"]),
        "list": pa.array([[1234567891234567891], [], None], pa.list_(pa.timestamp("ns"))),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    pairs = read_all(open_source(tmp_path / "x.parquet", 10))
    assert [pair.caption for pair in pairs] == ["a", "b", "c"] and read_all(
        open_source(tmp_path / "x.parquet", 1)
    ) == pairs
    first, second, third = (json.loads(pair.extra) for pair in pairs)
    assert first["crawled"] == first["nested"]["at"] == first["list"][0] == "2009-02-13 23:31:31.234567891"
    assert (
        second["crawled"] == "2009-02-13 23:31:31"
        and "crawled" not in third
        and third["nested"] == {"at": None, "n": 3}
    )
    assert first["took"] == "1234567891234567891" and "1000000000000" in first["far"] and first["zone"] == "5"
    assert first["kind"] == "x"


def test_text_in_parquet_that_is_not_utf_8_is_reported(tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
    images = pa.array([make_image(), make_image()])
    pq.write_table(pa.table({"image": images, "caption": texts, "note": texts}), tmp_path / "x.parquet")
    pair, bad = read_all(open_source(tmp_path / "x.parquet", 10))
    assert pair.caption == "ok" and bad.reason == 'not UTF-8: byte 0 of field "caption" cannot be decoded'
    pq.write_table(
        pa.table({"image": images, "caption": pa.array([b"x", "é".encode()]), "note": texts}), tmp_path / "x.parquet"
    )
    pairs = read_all(open_source(tmp_path / "x.parquet", 10))
    assert [pair.caption for pair in pairs] == ["x", "é"] and json.loads(pairs[1].extra) == {"note": "fffe"}
