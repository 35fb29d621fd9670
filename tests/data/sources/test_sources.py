"""Readers: every format gives the same documents under every part size; damaged containers are reported."""

import io
import json
import re
import tarfile
import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_cm3leon.data.sources import BadInput, Fields, Filtered, RawPair, RawText, open_source, read_image_bytes
from tests.data.runs import read_all


def make_image(gray=0, kind="PNG") -> bytes:
    """The file of a gray image of 10 x 8 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (10, 8), (gray % 256,) * 3).save(file, kind)
    return file.getvalue()


def read_pairs(source):
    """(caption, bytes) of every pair."""
    return [(pair.caption, read_image_bytes(pair.images[0])) for pair in read_all(source)]


CAPTIONS = ['plain "quoted", commas', "two\nlines", "ünï 🎈", " padded ", "<break>", "7"]


@pytest.fixture
def pairs_folder(tmp_path):
    """The same six pairs in every format."""
    rows = [{"image": f"images/{n}.png", "caption": text} for n, text in enumerate(CAPTIONS)]
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / f"images/{number}.png").write_bytes(make_image(40 * number))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ending, comma in (("csv", ","), ("tsv", "\t")):
        lines = [comma.join('"' + row[name].replace('"', '""') + '"' for name in ("caption", "image")) for row in rows]
        (tmp_path / f"pairs.{ending}").write_text("\r\n".join([comma.join(("caption", "image")), *lines]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "paths.parquet", row_group_size=4)
    embedded = [{"jpg": make_image(40 * n), "caption": text, "n": n} for n, text in enumerate(CAPTIONS)]
    pq.write_table(pa.Table.from_pylist(embedded), tmp_path / "bytes.parquet", row_group_size=2)
    hub = [{"image": {"bytes": make_image(40 * n), "path": "x.png"}, "text": text} for n, text in enumerate(CAPTIONS)]
    pq.write_table(pa.Table.from_pylist(hub), tmp_path / "hub.parquet")
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "pairs.tar")) as tar:
        for number, text in enumerate(CAPTIONS):
            tar.write({"__key__": f"{number:09d}", "png": make_image(40 * number), "txt": text, "json": {"n": number}})
    return tmp_path


FILES = ("pairs.jsonl", "pairs.csv", "pairs.tsv", "paths.parquet", "bytes.parquet", "hub.parquet", "pairs.tar")


def test_every_format_gives_the_same_pairs_under_every_part_size(pairs_folder):
    expected = [(text, make_image(40 * n)) for n, text in enumerate(CAPTIONS)]
    for name in FILES:
        source = open_source(pairs_folder / name, 100)
        assert read_pairs(source) == expected, name
        assert len({pair.key for pair in read_all(source)}) == 6
        for size in (1, 4, 5):
            divided = open_source(pairs_folder / name, size)
            assert divided.parts == (1 if name.endswith("tar") else -(-6 // size)), name
            assert read_all(divided) == read_all(source), name


def test_several_files_are_one_input_with_unique_keys(pairs_folder):
    for folder in ("a", "b"):
        (pairs_folder / folder).mkdir()
        for name in ("pairs.jsonl", "pairs.tar", "paths.parquet", "pairs.csv"):
            (pairs_folder / folder / name).write_bytes((pairs_folder / name).read_bytes())
        (pairs_folder / folder / "images").symlink_to(pairs_folder / "images")
    for name in ("pairs.jsonl", "pairs.tar", "paths.parquet", "pairs.csv"):
        several = [pairs_folder / "a" / name, pairs_folder / "b" / name]
        source = open_source(several, 4)
        pairs = read_all(source)
        assert [pair.caption for pair in pairs] == CAPTIONS * 2 and len({pair.key for pair in pairs}) == 12
        assert source.folder == str(pairs_folder) and pairs[6].source.startswith(f"b/{name}")
        assert read_pairs(source)[6:] == read_pairs(source)[:6]
        if not name.endswith("tar"):
            assert pairs[6].image_name == "b/images/0.png"
        assert open_source(several[:1], 4).identity != source.identity != open_source(several[::-1], 4).identity
    with pytest.raises(ValueError, match=r"files of several formats \(pairs\.jsonl: jsonl, pairs\.tar: tar\)"):
        open_source([pairs_folder / "pairs.jsonl", pairs_folder / "pairs.tar"], 4)


def test_urls_are_read_like_local_files(pairs_folder):
    memory = fsspec.filesystem("memory")
    for path in [pairs_folder / name for name in FILES] + sorted((pairs_folder / "images").iterdir()):
        memory.pipe(f"/corpus/{path.relative_to(pairs_folder)}", path.read_bytes())
    memory.pipe("/folder/0.png", make_image(1))
    memory.pipe("/folder/0.txt", b"beside")
    try:
        for name in FILES:
            local, remote = open_source(pairs_folder / name, 4), open_source(f"memory://corpus/{name}", 4)
            assert read_pairs(remote) == read_pairs(local), name
        assert read_pairs(open_source("memory://folder", 4)) == [("beside", make_image(1))]
        with zipfile.ZipFile(pairs_folder / "corpus.zip", "w") as archive:
            archive.writestr("texts.jsonl", '{"text": "inside"}\n')
        assert [text.texts for text in read_all(open_source(f"zip://texts.jsonl::{pairs_folder}/corpus.zip", 4))] == [
            ["inside"]
        ]
        local, remote = pairs_folder / "pairs.jsonl", f"file://{pairs_folder}/pairs.jsonl"
        assert read_pairs(open_source(remote, 4)) == read_pairs(open_source(local, 4))
        with pytest.raises(ValueError, match=r"--input memory://nowhere/x\.tar does not exist"):
            open_source("memory://nowhere/x.tar", 4)
    finally:
        memory.store.clear()


def test_output_of_img2dataset_is_read_without_conversion(tmp_path):
    """Its three layouts: tars next to Parquet files and statistics, a folder of files, Parquet with the bytes."""
    webdataset = pytest.importorskip("webdataset")
    rows = []
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"tars/{shard:05d}.tar")) as tar:
            for number in range(3):
                key = f"{shard:05d}{number:04d}"
                metadata = {
                    "caption": f"caption {key}", "url": f"http://x/{key}", "key": key, "status": "success",
                    "error_message": None, "width": 10, "height": 8, "original_width": 20, "original_height": 16,
                    "exif": "{}", "sha256": "0" * 64,
                }  # fmt: skip
                rows.append({**metadata, "jpg": make_image(shard * 100 + number, "JPEG")})
                sample = {"jpg": rows[-1]["jpg"], "txt": metadata["caption"], "json": metadata}
                tar.write({"__key__": key, **sample})
                folder = tmp_path / f"files/{shard:05d}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{key}.jpg").write_bytes(sample["jpg"])
                (folder / f"{key}.txt").write_text(sample["txt"])
                (folder / f"{key}.json").write_text(json.dumps(metadata))
        (tmp_path / f"tars/{shard:05d}_stats.json").write_text('{"count": 3}')
        pq.write_table(pa.table({"url": ["x"]}), tmp_path / f"tars/{shard:05d}.parquet")
    failed = {**rows[0], "jpg": None, "status": "failed_to_download", "error_message": "HTTP Error 404"}
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist([*rows, failed]), tmp_path / "parquet/00000.parquet")
    expected = [(row["caption"], row["jpg"]) for row in rows]
    for name in ("tars", "files"):
        source = open_source(tmp_path / name, 4)
        assert read_pairs(source) == expected
        assert json.loads(read_all(source)[4].extra)["url"] == "http://x/000010001"
    assert open_source(tmp_path / "tars", 4).parts == 2
    *pairs, missing = read_all(open_source(tmp_path / "parquet", 4))
    assert [pair.caption for pair in pairs] == [caption for caption, _ in expected]
    assert missing == Filtered("not downloaded")


def test_texts_and_interleaved_documents_are_read(tmp_path):
    (tmp_path / "corpus.txt").write_bytes("\ufefffirst line\r\n\n  second\nthird".encode())
    lines = read_all(open_source(tmp_path / "corpus.txt", 2))
    assert [line.segments for line in lines] == [["first line"], ["  second"], ["third"]]
    assert all(isinstance(line, RawText) for line in lines) and lines[1].source == "corpus.txt:3"
    (tmp_path / "folder/deep").mkdir(parents=True)
    (tmp_path / "folder/deep/a.txt").write_text("an entire\n\nfile\n")
    (tmp_path / "folder/b.md").write_bytes(b"\xff")
    texts = read_all(open_source(tmp_path / "folder", 2, "texts"))
    assert texts[0].reason == "not UTF-8: byte 0 cannot be decoded" and texts[1].segments == ["an entire\n\nfile\n"]
    segments = [{"text": "one"}, {"image": "0.png"}, {"text": "two"}, {"image": "1.png"}]
    (tmp_path / "mixed.jsonl").write_text(
        json.dumps({"segments": segments, "id": 5}) + '\n{"text": "alone", "id": 6}\n' + '{"segments": []}\n'
        '{"segments": [{"text": "a", "image": "b"}]}\n{"segments": [{"text": " "}]}\n{"segments": [{"image": 4}]}\n'
    )
    document, text, *bad = read_all(open_source(tmp_path / "mixed.jsonl", 10))
    assert document.texts == ["one", "two"] and document.kind == "interleaved" and document.extra == '{"id": 5}'
    assert [segment.path for segment in document.images] == [str(tmp_path / f"{n}.png") for n in range(2)]
    assert text.segments == ["alone"] and text.kind == "text" and text.extra == '{"id": 6}'
    assert [entry.reason for entry in bad] == [
        'field "segments" is empty, not a list of texts and pictures',
        'segment 0 is no {"text": ...} and no {"image": ...}',
        "empty text",
        'segment 0: field "image" is int, not text',
    ]
    pq.write_table(pa.Table.from_pylist([{"segments": segments, "id": 5}]), tmp_path / "mixed.parquet")
    (row,) = read_all(open_source(tmp_path / "mixed.parquet", 10))
    assert row.segments == document.segments


def test_a_caption_without_its_image_is_not_a_text(tmp_path):
    pairs = [{"image": "0.png", "text": "a"}, {"image": None, "text": "b"}]
    mixed = [{"image": "0.png", "caption": "a", "text": None}, {"image": None, "caption": None, "text": "b"}]
    failed = [{"jpg": None, "text": "b", "status": "failed_to_download"}]
    found = []
    for rows in (pairs, mixed, failed):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
        found.append(read_all(open_source(tmp_path / "x.parquet", 10))[-1])
    assert found[0].reason == 'field "image" is NoneType, not text'
    assert found[1].segments == ["b"] and found[2] == Filtered("not downloaded")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    source = open_source(tmp_path / "x.jsonl", 10, fields=Fields("", "text"))
    assert [entry.reason for entry in read_all(source)] == ['field "image" is missing: the fields are text'] * 2


def test_columns_with_other_names_are_given_by_fields(tmp_path):
    (tmp_path / "odd.csv").write_text("URL,TEXT\n0.png,hello\n")
    (pair,) = read_all(open_source(tmp_path / "odd.csv", 10, fields=Fields("URL", "TEXT")))
    assert isinstance(pair, RawPair) and (pair.caption, pair.image_name) == ("hello", "0.png")
    with pytest.raises(ValueError, match=r"header has 2 columns, 'URL', 'TEXT'.*give --image-field and"):
        open_source(tmp_path / "odd.csv", 10)


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_tar_members_that_are_not_a_pair_are_reported(tmp_path):
    image = make_image()
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("../../etc/0.JPG", image), ("../../etc/0.TXT", b"upper case, and a name that leaves the folder"),
            ("1.jpg", image),
            ("2.txt", b"no image"),
            ("3.jpg", image), ("3.txt", b"\xff"),
            ("4.jpg", image), ("4.jpg", image), ("4.txt", b"x"),
            ("5.jpg", image), ("5.png", image), ("5.txt", b"x"),
            ("6.jpg", image), ("6.json", b'{"caption": "from json", "w": 1}'), ("6.cls", b"7"),
            ("7.jpg", image), ("7.json", b"[]"),
            ("/abs/1.jpg", image), ("/abs/1.txt", b"absolute"),
            ("1.jpg", image), ("1.txt", b"again"),
            ("8.jpg", b""), ("8.txt", b"zero bytes"),
            ("9.jpg", image), ("9.txt", b" \n"),
        ],
    )  # fmt: skip
    entries = read_all(open_source(path, 10))
    assert [(entry.source, entry.reason) for entry in entries if isinstance(entry, BadInput)] == [
        ("x.tar/1", "duplicate key: 1 has more than one .jpg"),
        ("x.tar/2", "no image among the members: 2 (.txt)"),
        ("x.tar/3", "not UTF-8: byte 0 of 3.txt cannot be decoded"),
        ("x.tar/4", "duplicate key: 4 has more than one .jpg"),
        ("x.tar/5", "duplicate image members: jpg, png: 5"),
        ("x.tar/7", "not a JSON object but list"),
        ("x.tar/9", "empty caption"),
    ]
    assert [entry.caption for entry in entries if isinstance(entry, RawPair)] == [
        "upper case, and a name that leaves the folder", "from json", "absolute", "zero bytes",
    ]  # fmt: skip
    assert len(entries) == 11
    assert [entry.key for entry in entries] == [f"000000-{number:06d}" for number in range(11)]


def test_a_truncated_or_damaged_tar_is_reported_with_the_position(tmp_path):
    members = [
        (f"{n}.{ending}", content) for n in range(4) for ending, content in (("png", make_image(n)), ("txt", b"t"))
    ]
    content = write_tar(tmp_path / "complete.tar", members).read_bytes()
    used = 8 * 1024  # each member: header and one block
    for size, pairs, message in (
        (used + 512, 4, ""),  # one block of zeros ends an archive
        (used, 3, r"truncated or damaged tar: in 3 at byte 8192: the end mark is missing"),
        (used - 100, 3, r"truncated or damaged tar: in 3 at byte \d+: .*"),
        (5 * 1024 + 512 + 10, 2, r"truncated or damaged tar: in 2 at byte \d+: .*"),
        (5 * 1024 + 100, 2, r"truncated or damaged tar: in 2 at byte \d+: .*"),
    ):
        path = tmp_path / "cut.tar"
        path.write_bytes(content[:size])
        entries = read_all(open_source(path, 10))
        assert sum(isinstance(entry, RawPair) for entry in entries) == pairs, size
        assert len(entries) == pairs + bool(message), size
        if message:
            assert re.fullmatch(message, entries[-1].reason), entries[-1].reason
    (tmp_path / "magic.tar").write_bytes(content[: 4 * 1024] + b"\x01" * 512 + content[4 * 1024 + 512 :])
    *good, bad = read_all(open_source(tmp_path / "magic.tar", 10))
    assert len(good) == 1 and bad.reason == "truncated or damaged tar: in 1 at byte 4096: a header is damaged"
    (tmp_path / "html.tar").write_bytes(b"<html>no such file</html>" * 100)
    (bad,) = read_all(open_source(tmp_path / "html.tar", 10))
    assert bad.reason.startswith("not a tar: ") and "begins with b'<html>no'" in bad.reason


def test_damaged_tables_are_reported(tmp_path):
    (tmp_path / "bad.csv").write_bytes(
        b'image,caption\n0.png,fine\n\n1.png,a\n2.png\n3.png,\xff\n4.png,one,two\n5.png,"x"y\n'
    )
    entries = read_all(open_source(tmp_path / "bad.csv", 2))
    assert [getattr(entry, "reason", "") for entry in entries] == [
        "",
        "",
        "not CSV: 1 fields, the header has 2",
        "not UTF-8: byte 6 of the record cannot be decoded",
        "not CSV: 3 fields, the header has 2",
        "not CSV: ',' expected after '\"' (1 lines)",
    ]
    (tmp_path / "open.csv").write_text('image,caption\n0.png,"never closed\n1.png,x\n2.png,y\n')
    (entry,) = read_all(open_source(tmp_path / "open.csv", 2))
    assert entry.reason == "not CSV: unexpected end of data (3 lines)"
    rows = [{"image": make_image(n), "caption": "x" * 2000 + str(n)} for n in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "good.parquet", row_group_size=100, compression="none")
    content = bytearray((tmp_path / "good.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[:5000])
    (bad,) = read_all(open_source(tmp_path / "cut.parquet", 10))
    assert bad.reason.startswith("damaged Parquet file: ")
    group = pq.ParquetFile(tmp_path / "good.parquet").metadata.row_group(1).column(1)
    content[group.data_page_offset : group.data_page_offset + 40] = b"\xff" * 40
    (tmp_path / "hole.parquet").write_bytes(content)
    entries = read_all(open_source(tmp_path / "hole.parquet", 50))
    assert len(entries) == 300 and sum(isinstance(entry, BadInput) for entry in entries) == 100
    assert entries[100].reason.startswith("damaged Parquet file: ") and entries[100].source == "hole.parquet:row 101"


def test_only_a_line_feed_ends_a_record(tmp_path):
    """str.splitlines also splits at other line ends of Unicode, which a caption may contain."""
    text = "one\u2028two\x85three\x0bfour\x1cfive"
    (tmp_path / "x.csv").write_text(f"image,caption\n0.png,{text}\n1.png,next\n", newline="\n")
    assert [pair.caption for pair in read_all(open_source(tmp_path / "x.csv", 10))] == [text, "next"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("image,caption\n0.png,x\n".encode("utf-16"), r"x\.csv is UTF-16, not UTF-8; convert it: iconv -f UTF-16"),
        (b"image,caption,caption\n0.png,x,y\n", r"x\.csv has the column 'caption' twice"),
        (b"\nimage,caption\n0.png,x\n", r"x\.csv begins with a blank line, not with a header"),
        (b"image,caption\r0.png,x\r", r"carriage return outside quotes without a line feed after it"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "x.csv", 10)


def test_paths_and_options_are_checked_before_reading(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match=r"--format texts reads a folder, but --input .*a\.tar is a file"):
        open_source(tmp_path / "a.tar", 4, "texts")
    (tmp_path / "a.jsonl.GZ").touch()
    with pytest.raises(ValueError, match=r"a\.jsonl\.GZ is compressed; unpack it first"):
        open_source(tmp_path / "a.jsonl.GZ", 4)
    with pytest.raises(ValueError, match=r"holds no \.csv or \.tsv file, which --format csv reads"):
        open_source(tmp_path, 4, "csv")
    with pytest.raises(ValueError, match="must be one folder, or files; of its 2 values, one is a folder"):
        open_source([tmp_path, tmp_path / "a.tar"], 4)
    with pytest.raises(ValueError, match=r"--part-size \(0\) must be at least 1"):
        open_source(tmp_path, 0)


def test_a_tar_of_the_same_size_with_other_content_has_another_identity(tmp_path):
    for name, text in (("one", b"a red kite"), ("two", b"a mad kite")):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "x.tar", "w") as tar:
            member = tarfile.TarInfo("0.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    one, two = (open_source(tmp_path / name / "x.tar", 10) for name in ("one", "two"))
    assert one.identity != two.identity
    assert one.identity == open_source(tmp_path / "one" / "x.tar", 10).identity
