"""Folders of users: links, names in other Unicode forms, tables next to images, other formats."""

import json
import logging
import os
import unicodedata
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cm3leon.data.sources import BadInput, Fields, RawPair, open_source, read_image_bytes
from megatron_cm3leon.data.sources.files import is_url, join_path, list_folder, make_absolute
from tests.data.runs import read_all
from tests.data.sources.test_sources import make_image, write_tar

IMAGE = make_image(7)


def write_files(folder: Path, **files) -> Path:
    """Write files by name; the content is a text, bytes, or True for an image."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGE if content is True else content.encode() if isinstance(content, str) else content)
    return folder


def read_captions(source) -> dict[str, str]:
    """Captions by name of the image; every input must be a pair with the content IMAGE."""
    entries = read_all(source)
    assert all(isinstance(entry, RawPair) for entry in entries), entries
    assert all(read_image_bytes(entry.images[0]) == IMAGE for entry in entries)
    return {entry.image_name: entry.caption for entry in entries}


def read_reasons(source) -> dict[str, str]:
    return {entry.source: entry.reason for entry in read_all(source) if isinstance(entry, BadInput)}


def test_linked_folders_are_read_once_and_loops_are_skipped(tmp_path, caplog):
    write_files(tmp_path, **{"in/real/0.png": True, "in/real/0.txt": "a", "store/deep/1.png": True})
    write_files(tmp_path, **{"store/deep/1.txt": "b", "outside.png": True})
    plain = open_source(tmp_path / "in", 4).identity
    for link, target in {"in/up": "..", "in/real/self": ".", "in/again": "real", "in/zreal": "real"}.items():
        (tmp_path / link).symlink_to(target)
    assert open_source(tmp_path / "in", 4).identity == plain  # no new files: existing shards remain valid
    (tmp_path / "in/disk").symlink_to("../store")
    (tmp_path / "store/back").symlink_to("../in/real")
    (tmp_path / "in/one.png").symlink_to("real/0.png")
    (tmp_path / "in/one.txt").write_text("c")
    with caplog.at_level(logging.INFO):
        source = open_source(tmp_path / "in", 4)
    assert read_captions(source) == {"disk/deep/1.png": "b", "one.png": "c", "real/0.png": "a"}
    assert "2 files are read through the link" in caplog.text and "in/up is a link to a folder that" in caplog.text
    (tmp_path / "linked").symlink_to("in/real")
    assert read_captions(open_source(tmp_path / "linked", 4)) == {"0.png": "a"}


def test_a_broken_link_is_reported(tmp_path):
    write_files(tmp_path, **{"0.png": True, "0.txt": "a", "1.txt": "b"})
    (tmp_path / "1.png").symlink_to("/nowhere/1.png")
    names = [entry.image_name for entry in read_all(open_source(tmp_path, 4))]
    assert names == ["0.png", "1.png"]  # reading 1.png fails later
    (tmp_path / "disk").symlink_to("/nowhere/images")
    with pytest.raises(ValueError, match=r"disk is a link to /nowhere/images, which does not exist; mount or restore"):
        open_source(tmp_path, 4)
    with pytest.raises(FileNotFoundError):
        list_folder(str(tmp_path / "absent"))


NAMES = ["café", "über", "ガールズ", "plain"]


@pytest.mark.parametrize("images, texts", [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_names_in_different_unicode_forms_are_matched(tmp_path, images, texts):
    for number, name in enumerate(NAMES):
        first, second = unicodedata.normalize(images, name), unicodedata.normalize(texts, name)
        write_files(tmp_path / "in", **{f"sub/{first}.png": True, f"sub/{second}.txt": f"caption {number}"})
        row = json.dumps({"image": f"in/sub/{second}.png", "caption": f"caption {number}"}, ensure_ascii=False)
        with open(tmp_path / "list.jsonl", "a") as lines:
            lines.write(row + "\n")
    (tmp_path / "in/sub" / unicodedata.normalize(texts, "café.json")).write_text('{"id": 5}')
    expected = [f"caption {number}" for number in range(4)]
    source = open_source(tmp_path / "in", 10)
    assert sorted(read_captions(source).values()) == expected
    assert [json.loads(entry.extra) for entry in read_all(source) if "caf" in entry.image_name] == [{"id": 5}]
    assert sorted(read_captions(open_source(tmp_path / "list.jsonl", 10)).values()) == expected


def test_a_file_with_the_exact_spelling_has_priority(tmp_path):
    nfd, nfc = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    write_files(tmp_path, **{f"{nfd}.png": True, f"{nfc}.png": True, f"{nfc}.txt": "composed"})
    source = open_source(tmp_path, 10)
    assert read_reasons(source) == {f"{nfd}.png": f"no caption: {nfd}.txt is missing beside the image"}
    assert [entry.caption for entry in read_all(source) if isinstance(entry, RawPair)] == ["composed"]
    (tmp_path / f"{nfd}.txt").write_text("decomposed")
    assert read_captions(open_source(tmp_path, 10)) == {f"{nfd}.png": "decomposed", f"{nfc}.png": "composed"}


def test_every_extension_of_an_image_is_read(tmp_path):
    for number, ending in enumerate(("jfif", "JPE", "jp2", "apng", "pgm", "dib", "ico", "jpx", "heic", "svg", "JXL")):
        write_files(tmp_path, **{f"{number}.{ending}": True, f"{number}.txt": "caption"})
    assert len(read_captions(open_source(tmp_path, 20))) == 11  # only the decoder checks the content
    write_files(tmp_path, **{"0.heic": True, "film.mp4": True, "film.txt": "x", "lone.txt": "x"})
    source = open_source(tmp_path, 20)
    assert read_reasons(source) == {
        "film.txt": "no image with the name of this caption: film.mp4 is not in a format of images",
        "lone.txt": "no image with the name of this caption",
    }
    assert source.count == 13  # 0.heic and 0.jfif are the same photo


def test_file_names_are_not_mistaken_for_urls(tmp_path):
    names = ["std::vec", "a::b::c", "zip::x", "s3:", "http:__x", "50%", "#1", "q?v=1", "[a]", "{0..1}", "* ~"]
    for name in names:
        write_files(tmp_path / "in", **{f"{name}.png": True, f"{name}.txt": name})
    with open(tmp_path / "in/list.jsonl", "w") as lines:
        lines.writelines(json.dumps({"image": f"{name}.png", "caption": name}) + "\n" for name in names)
    expected = {f"{name}.png": name for name in names}
    assert read_captions(open_source(tmp_path / "in", 20)) == expected
    assert read_captions(open_source(tmp_path / "in/list.jsonl", 20)) == expected
    (tmp_path / "in").rename(tmp_path / "std::{0..1}*")
    assert read_captions(open_source(tmp_path / "std::{0..1}*", 20)) == expected
    memory = fsspec.filesystem("memory")
    for name in ("std::vec", "50%"):
        memory.pipe(f"/odd/{name}.png", IMAGE)
        memory.pipe(f"/odd/{name}.txt", name.encode())
    try:
        assert read_captions(open_source("memory://odd", 4)) == {"std::vec.png": "std::vec", "50%.png": "50%"}
    finally:
        memory.store.clear()


def test_urls_are_recognized_and_joined():
    for url in ("s3://b/x", "zip://a.png::x.zip", "simplecache::s3://b/x", "filecache::/x", "memory://"):
        assert is_url(url), url
    for name in ("/in/std::vec.png", "std::vec.png", "zip::a.png", "C:\\x.png", "a:b"):
        assert not is_url(name), name
    assert join_path("simplecache::s3://b/in", "0.png") == "simplecache::s3://b/in/0.png"
    assert join_path("zip://::/x.zip", "0.png") == "zip://0.png::/x.zip"
    assert join_path("zip://in::x.zip", "0.png") == "zip://in/0.png::x.zip"
    assert make_absolute("file:///data/x") == "/data/x"


def test_a_folder_in_an_archive_is_read(tmp_path):
    write_files(tmp_path, **{"in/0.png": True, "in/0.txt": "a"})
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("in/0.png", "in/0.txt"):
            archive.write(tmp_path / name, name)
    assert read_captions(open_source(f"zip://in::{tmp_path}/x.zip", 4)) == {"0.png": "a"}


def test_parquet_files_of_metadata_next_to_images_are_not_the_input(tmp_path, caplog):
    write_files(tmp_path, **{"00000/0.jpg": True, "00000/0.txt": "a", "00000/0.json": '{"url": "x"}'})
    write_files(tmp_path, **{"00000_stats.json": "{}"})
    pq.write_table(pa.table({"url": ["x"], "caption": ["a"], "key": ["0"]}), tmp_path / "00000.parquet")
    with caplog.at_level(logging.INFO):
        assert read_captions(open_source(tmp_path, 4)) == {"00000/0.jpg": "a"}
    assert "00000.parquet without images; read as --format folder" in caplog.text
    assert len(read_all(open_source(tmp_path, 4, "parquet"))) == 1
    pq.write_table(pa.table({"jpg": [IMAGE], "caption": ["b"]}), tmp_path / "00001.parquet")
    assert [entry.source for entry in read_all(open_source(tmp_path, 4))][1:] == ["00001.parquet:row 1"]
    (tmp_path / "00001.parquet").write_bytes(b"cut off")
    assert read_captions(open_source(tmp_path, 4)) == {"00000/0.jpg": "a"}
    assert "00001.parquet is not a Parquet file that can be read" in caplog.text
    write_files(tmp_path / "texts", **{"logo.png": True})
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "texts/0.parquet")
    assert [entry.texts for entry in read_all(open_source(tmp_path / "texts", 4))] == [["b"]]


def write_metadata(folder: Path, ending: str, rows: list[dict]) -> None:
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    elif ending == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))
    else:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_imagefolder_is_read_by_its_metadata(tmp_path, ending, caplog):
    for split in ("test", "train"):
        write_files(tmp_path / split, **{"a/0.png": True, "1.png": True})
        rows = [{"file_name": name, "text": f"{split} {name}"} for name in ("a/0.png", "1.png")]
        write_metadata(tmp_path / split, ending, rows)
    expected = {f"{split}/{name}": f"{split} {name}" for split in ("test", "train") for name in ("a/0.png", "1.png")}
    assert read_captions(open_source(tmp_path, 10)) == expected
    assert read_captions(open_source(tmp_path / "train", 10, fields=Fields("", "text"))).keys() == {"a/0.png", "1.png"}
    assert not caplog.records
    write_files(tmp_path / "train", **{"2.png": True})
    open_source(tmp_path, 10)
    assert "5 images, but 4 rows in the metadata file: images without a row are not read" in caplog.text
    write_files(tmp_path / "train", **{"2.txt": "beside"})  # text files next to images have priority
    assert open_source(tmp_path / "train", 10).count == 3


def test_the_error_names_a_table_next_to_images(tmp_path):
    write_files(tmp_path, **{"0.png": True, "captions.jsonl": '{"image": "0.png", "caption": "a"}\n'})
    with pytest.raises(
        ValueError, match=r"If captions\.jsonl lists them, give that file: --input .*/captions\.jsonl\."
    ):
        open_source(tmp_path, 4)
    source = open_source(tmp_path, 4, "folder")
    assert read_reasons(source) == {"0.png": "no caption: 0.txt is missing beside the image"}


@pytest.mark.parametrize(
    "names, message",
    [
        (["d.tar.gz", "README.txt"], r"d\.tar\.gz is compressed; unpack it first, because parts begin in"),
        (["d.TGZ"], r"d\.TGZ is compressed; unpack it first"),
        (
            ["data-00000.arrow", "state.json"],
            r"data-00000\.arrow is an Arrow file, which is not read; convert it to Pa",
        ),
        (["a.jsonl", "b.jsonl.gz"], r"holds no image and no tar, but a\.jsonl; --format jsonl reads them"),
        (["a.csv"], r"but a\.csv; --format csv reads them as tables"),
        (["a.txt", "b.txt"], r"holds no image, but a\.txt, b\.txt; --format texts reads each one as a document"),
        (["a.mp4", "b.mp4", "c"], r"holds \.mp4 \(2\), no extension \(1\), which are not read; expected images \("),
        ([], r"holds no file, which are not read"),
    ],
)
def test_the_error_lists_the_files_of_a_folder_without_readable_files(tmp_path, names, message):
    write_files(tmp_path, **dict.fromkeys(names, "x"))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, 4)


@pytest.mark.parametrize(
    "name, message",
    [
        ("d.tar.gz", r"d\.tar\.gz is compressed; unpack it first"),
        ("data.arrow", r"data\.arrow is an Arrow file, which is not read"),
        ("data.npz", r"data\.npz ends with \.npz, which is none of the formats that are read; convert it, or give its"),
        ("data", r"data has no ending, which is none of the formats"),
    ],
)
def test_a_file_of_an_unsupported_format_is_refused(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"PK\3\4 something")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name, 4)
    (tmp_path / "rows.list").write_text('\ufeff{"text": "as JSONL"}\n')
    assert len(read_all(open_source(tmp_path / "rows.list", 4))) == 1


def test_files_that_are_not_read_are_logged(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [("0.png", IMAGE), ("0.txt", b"x")])
    write_files(tmp_path, **{"b.tar.gz": "x", "1.png": True})
    assert len(read_captions(open_source(tmp_path, 4))) == 1
    assert "1 compressed files are not read; unpack them first (b.tar.gz)" in caplog.text
    assert "1 images next to the tars are not read; --format folder reads them (1.png)" in caplog.text


def test_quoted_patterns_are_expanded(tmp_path, monkeypatch, caplog):
    for number in range(12):
        write_tar(tmp_path / f"part{number:02d}.tar", [("0.png", IMAGE), ("0.txt", str(number).encode())])

    def captions(pattern):
        return [int(pair.caption) for pair in read_all(open_source(pattern, 4))]

    assert captions(f"{tmp_path}/part{{00..02}}.tar") == [0, 1, 2]
    assert captions(f"{tmp_path}/part{{03,01}}.tar") == [3, 1]
    assert captions(f"{tmp_path}/*.tar") == list(range(12))
    assert captions([f"{tmp_path}/part0[12].tar", tmp_path / "part11.tar"]) == [1, 2, 11]
    assert captions(f"{tmp_path}/part{{00..01}}?tar") == [0, 1]
    expanded = open_source([tmp_path / "part00.tar", tmp_path / "part01.tar"], 4)
    assert open_source(f"{tmp_path}/part{{00..01}}.tar", 4).identity == expanded.identity
    monkeypatch.setenv("HOME", str(tmp_path))
    assert captions("~/part0{4..5}.tar") == [4, 5] and captions("~/part06.tar") == [6]
    memory = fsspec.filesystem("memory")
    memory.pipe("/tars/part0.tar", (tmp_path / "part00.tar").read_bytes())
    assert captions("memory://tars/part{0..0}.tar") == captions("memory://tars/*.tar") == [0]
    memory.store.clear()
    os.rename(tmp_path / "part07.tar", tmp_path / "odd [1] {a,b}.tar")
    assert captions(tmp_path / "odd [1] {a,b}.tar") == [7]
    for pattern, message in {
        "none*.tar": r"none\*\.tar matches no file",
        "part{07..08}.tar": r"part07\.tar does not exist",
        "part{07.tar": r"part\{07\.tar does not exist",
        "part00.tar::part01.tar": r"does not exist; .* Several inputs are separated by spaces",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(str(tmp_path / pattern), 4)
