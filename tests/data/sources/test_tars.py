"""Tars of users: members of other programs, members of a key that are not adjacent, dots in names, links."""

import io
import json
import logging
import random
import tarfile
import unicodedata

import pytest

from megatron_cm3leon.data.sources import BadInput, RawPair, open_source, read_image_bytes
from tests.data.runs import read_all
from tests.data.sources.test_sources import make_image, write_tar

IMAGES = [make_image(20 * number) for number in range(12)]


def read_captions(path) -> dict[str, str]:
    """Captions by key; every input must be a pair of a number as caption and the image of this number."""
    entries = read_all(open_source(path, 10))
    assert all(isinstance(entry, RawPair) for entry in entries), entries
    for entry in entries:
        assert read_image_bytes(entry.images[0]) == IMAGES[int(entry.caption)]
    return {entry.source.partition("/")[2]: entry.caption for entry in entries}


def read_reasons(path) -> list[str]:
    return [entry.reason for entry in read_all(open_source(path, 10)) if isinstance(entry, BadInput)]


def make_members(count=4, name="{:04d}", image="{}.png", text="{}.txt") -> list[tuple[str, bytes]]:
    pairs = [(name.format(number), IMAGES[number], str(number).encode()) for number in range(count)]
    return [member for key, png, txt in pairs for member in ((image.format(key), png), (text.format(key), txt))]


def test_members_of_operating_systems_and_datasets_are_ignored(tmp_path):
    members = [("__dataset__.json", b"{}"), ("./.DS_Store", b"x"), ("__MACOSX/0000.txt", b"x"), ("README", b"x")]
    for name, content in make_members(name="./{:04d}"):
        members += [(f"./._{name[2:]}", b"\0\5\26\7"), (name, content)]
    members += [("00000_stats.json", b'{"count": 4}'), ("dataset_info.json", b"{}")]
    members += [("Thumbs.db", b"x"), ("LICENSE.md", b"x"), (".gitignore", b"x"), ("__x__.yaml", b"x")]
    assert len(read_captions(write_tar(tmp_path / "x.tar", members))) == 4
    others = [("._0.png", IMAGES[0]), ("0.npy", b"x"), ("1.npy", b"x")]
    assert read_reasons(write_tar(tmp_path / "y.tar", others)) == [
        "no image and no caption among its 3 members, such as ._0.png"
    ]
    assert read_reasons(write_tar(tmp_path / "empty.tar", [])) == []
    unpaired = [*make_members(1), ("1.json", b'{"caption": "its image is missing"}'), ("2.json", b"[]")]
    assert read_reasons(write_tar(tmp_path / "z.tar", unpaired)) == [
        "no image among the members: 1 (.json)", "no image among the members: 2 (.json)",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_members_in_any_order_give_the_pairs_of_a_sorted_tar(tmp_path, seed, caplog):
    members = make_members(12)
    members += [(f"{number:04d}.json", json.dumps({"id": number}).encode()) for number in range(12)]
    expected = read_all(open_source(write_tar(tmp_path / "x.tar", sorted(members)), 10))
    assert [json.loads(entry.extra) for entry in expected] == [{"id": number} for number in range(12)]
    random.Random(seed).shuffle(members)
    with caplog.at_level(logging.INFO):
        entries = read_all(open_source(write_tar(tmp_path / "x.tar", members), 10))
    assert "x.tar: members of a key are not adjacent, which takes longer to read; tar --sort=name" in caplog.text
    assert len({entry.key for entry in entries}) == 12

    def show(entries):
        return sorted(
            (entry.source, entry.segments[0], entry.image_name, entry.segments[1].content) for entry in entries
        )

    assert show(entries) == show(expected)
    extras = {entry.source: entry.extra for entry in entries}
    assert extras == {entry.source: entry.extra for entry in expected}


def test_members_apart_from_those_of_their_key_are_reported(tmp_path):
    members = [*make_members(2), ("0000.json", b'{"id": 5}'), ("0001.cls", b"x")]
    assert read_reasons(write_tar(tmp_path / "x.tar", members)) == [
        "duplicate key: 0000 occurs earlier in this tar, not next to these members (.json); tar --sort=name keeps the "
        "members of a key together"
    ]
    members = [("0.txt", b"0"), ("1.png", IMAGES[1]), ("2.txt", b"2"), ("1.txt", b"1"), ("2.jpg", IMAGES[2])]
    assert read_reasons(write_tar(tmp_path / "x.tar", members)) == ["no image among the members: 0 (.txt)"]


def test_a_truncated_tar_that_is_not_sorted_gives_its_complete_pairs(tmp_path):
    members = sorted(make_members(4), key=lambda member: member[0][::-1])  # captions last
    content = write_tar(tmp_path / "x.tar", members).read_bytes()
    (tmp_path / "x.tar").write_bytes(content[: 7 * 1024 + 100])
    *bad, cut = read_reasons(tmp_path / "x.tar")
    assert cut.startswith("truncated or damaged tar: in ") and len(bad) == 1
    assert sum(isinstance(entry, RawPair) for entry in read_all(open_source(tmp_path / "x.tar", 10))) == 3


@pytest.mark.parametrize("form", ["photo_v{}.5 (Clean)", "v1.{}", "sub.d/a.b.{}.c", "{}"])
def test_keys_may_contain_dots(tmp_path, form):
    members = make_members(3, form)
    expected = {form.format(number): str(number) for number in range(3)}
    assert read_captions(write_tar(tmp_path / "x.tar", members)) == expected
    assert read_captions(write_tar(tmp_path / "x.tar", members[::-1])) == expected
    random.Random(0).shuffle(members)
    assert read_captions(write_tar(tmp_path / "x.tar", members)) == expected


def test_extensions_of_several_parts_are_read(tmp_path):
    image, text = "{}.image.png", "{}.caption.txt"
    assert read_captions(write_tar(tmp_path / "x.tar", make_members(2, image=image, text=text))) == {
        "0000": "0",
        "0001": "1",
    }
    assert len(read_captions(write_tar(tmp_path / "x.tar", make_members(2, image=image)))) == 2
    assert len(read_captions(write_tar(tmp_path / "x.tar", make_members(2, text=text)))) == 2
    members = [("0.png", IMAGES[0]), ("0.seg.png", IMAGES[1]), ("0.txt", b"0"), ("0.alt.txt", b"x")]
    assert read_captions(write_tar(tmp_path / "x.tar", members)) == {"0": "0"}
    members = [("0.a.png", IMAGES[0]), ("0.b.png", IMAGES[0]), ("0.txt", b"0"), ("v1.2.png", IMAGES[0])]
    assert read_reasons(write_tar(tmp_path / "x.tar", [*members, ("1.a.txt", b"1"), ("1.b.txt", b"1")])) == [
        "duplicate image members: a.png, b.png: 0; a key ends at the first dot of a name, and the endings of 0 are "
        ".a.png, .b.png, .txt",
        "no caption: v1 has no .txt and no .json with a caption; a key ends at the first dot of a name, and the "
        "endings of v1 are .2.png",
        "no image among the members: 1; a key ends at the first dot of a name, and the endings of 1 are .a.txt, .b.txt",
    ]


def test_images_in_other_formats_are_read_and_missing_ones_are_reported(tmp_path):
    image = IMAGES[0]
    members = [
        ("0.jfif", image), ("0.txt", b"0"), ("1.JP2", image), ("1.txt", b"0"), ("2.heic", image), ("2.txt", b"0"),
        ("3.jpg", image), ("3.heic", b"x"), ("3.ico", b"x"), ("3.txt", b"0"), ("4.mp4", b"x"), ("4.txt", b"x"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    assert [entry.image_name for entry in read_all(open_source(path, 10)) if isinstance(entry, RawPair)] == [
        "x.tar/0.jfif", "x.tar/1.jp2", "x.tar/2.heic", "x.tar/3.jpg",
    ]  # fmt: skip
    assert read_reasons(path) == ["no image among the members: 4 (.mp4, .txt)"]


def test_names_in_different_unicode_forms_are_matched(tmp_path):
    nfd, nfc = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    members = [(f"{nfd}.png", IMAGES[0]), *make_members(2), (f"{nfc}.txt", b"0")]
    assert sorted(read_captions(write_tar(tmp_path / "x.tar", members)).values()) == ["0", "0", "1"]
    members += [(f"{nfc}.png", IMAGES[0]), (f"{nfd}.txt", b"0")]
    assert len(read_captions(write_tar(tmp_path / "x.tar", members))) == 4


HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE


def write_links(path, items):
    """A tar of files (name, content) and links (type, name, target)."""
    with tarfile.open(path, "w") as tar:
        for *kind, name, content in items:
            info = tarfile.TarInfo(name)
            if kind:
                info.type, info.linkname = kind[0], content
            else:
                info.size = len(content)
            tar.addfile(info, None if kind else io.BytesIO(content))
    return path


def test_links_are_resolved(tmp_path):
    items = [
        (SOFT, "a/9.png", "../b/0.png"), ("a/9.txt", b"0"),  # a link to a later member
        ("./b/0.png", IMAGES[0]), ("./b/0.txt", b"0"),
        (HARD, "./b/1.png", "./b/0.png"), (HARD, "./b/1.txt", "b/0.txt"),
        (HARD, "./b/2.png", "./b/1.png"), (SOFT, "./b/2.txt", "0.txt"),
        (SOFT, "3.png", "b/0.png"), (SOFT, "3.txt", "./b/../b/0.txt"),
        (SOFT, "4.png", "late/4"), (SOFT, "4.txt", "late/5"),
        (SOFT, "late/4", "../b/0.png"), (SOFT, "late/5", "../3.txt"),
    ]  # fmt: skip
    path = write_links(tmp_path / "x.tar", items)
    assert read_captions(path).keys() == {"a/9", "./b/0", "./b/1", "./b/2", "3", "4"}
    random.Random(1).shuffle(items)
    assert len(read_captions(write_links(path, sorted(items, key=lambda item: item[0] == HARD)))) == 6


def test_broken_links_are_reported(tmp_path):
    items = [
        (SOFT, "0.png", "../other/0.png"), ("0.txt", b"0"),
        ("1.png", IMAGES[1]), (HARD, "1.txt", "missing.txt"),
        (tarfile.FIFOTYPE, "2.png", ""), ("2.txt", b"0"),
        (SOFT, "3.png", "3.png"), ("3.txt", b"0"),
        ("4.png", IMAGES[4]), ("4.txt", b"4"),
    ]  # fmt: skip
    path = write_links(tmp_path / "x.tar", items)
    remedy = (
        "which is not in the tar; write it with tar --dereference --hard-dereference, which stores the files themselves"
    )
    assert read_reasons(path) == [
        f"0.png is a link to ../other/0.png, {remedy}",
        f"1.txt is a link to missing.txt, {remedy}",
        "2.png is not a regular file in the tar",
        f"3.png is a link to 3.png, {remedy}",
    ]


@pytest.mark.parametrize("mode, kind", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_tar_is_reported(tmp_path, mode, kind):
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        tar.add(__file__)
    (reason,) = read_reasons(tmp_path / "x.tar")
    assert f"it is compressed ({kind}); unpack it first" in reason
