"""Folders of images: what is listed, refused, and done to an image before a network sees it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from megatron_cm3leon.evaluation.metrics.image_folder import (
    Preparation,
    check_sizes,
    find_rank_folders,
    hash_images,
    list_images,
)
from tests.evaluation.metrics.images import write_images


def test_bad_folders_are_refused_with_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"--images \(.*absent\) is not a folder"):
        list_images(tmp_path / "absent", "--images")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--images \(.*empty\) holds no image"):
        list_images(tmp_path / "empty", "--images")
    with pytest.raises(ValueError, match="holds 1 image, but a covariance requires at least 2"):
        list_images(write_images(tmp_path / "one", 1), "--reference")
    folder = write_images(tmp_path / "sizes", 3)
    Image.new("RGB", (8, 9)).save(folder / "z.png")
    files = list_images(folder, "--images")
    with pytest.raises(ValueError, match=r"images of 2 sizes \(3 of 16x16, 1 of 8x9\); give --size"):
        check_sizes(files, "--images", Preparation())
    check_sizes(files, "--images", Preparation(size=16))
    (folder / "z.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"z\.png: the image cannot be read .*; remove or replace the file"):
        check_sizes(files, "--images", Preparation())
    with pytest.raises(ValueError, match=r"z\.png: .*; remove or replace the file\.$"):
        Preparation().load(folder / "z.png")


def test_a_header_that_promises_gigabytes_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: the image cannot be read \(Image size"):
        check_sizes([tmp_path / "a.png"], "--images", Preparation())


def test_images_are_of_one_size_as_they_are_shown(tmp_path):
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=orientation)
    Image.new("RGB", (10, 20)).save(tmp_path / "b.jpg")
    files = list_images(tmp_path, "--images")
    check_sizes(files, "--images", Preparation())
    assert {Preparation().load(path).shape for path in files} == {(20, 10, 3)}
    Image.new("RGB", (20, 10)).save(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match=r"images of 2 sizes"):
        check_sizes(files, "--images", Preparation())


def test_the_hash_is_of_the_images_alone(tmp_path):
    folder = write_images(tmp_path / "images", 2)
    before = hash_images(folder, list_images(folder, "--images"))
    (folder / "items.jsonl").write_text("{}")
    assert hash_images(folder, list_images(folder, "--images")) == before
    Image.new("RGB", (16, 16)).save(folder / "001.png")
    assert hash_images(folder, list_images(folder, "--images")) != before


def test_the_sheet_of_generated_images_is_not_one_of_them(tmp_path):
    folder = write_images(tmp_path / "images", 2)
    for name in ("generated.json", "contact_sheet.png", "notes.txt"):
        (folder / name).write_text("{}")
    assert [path.name for path in list_images(folder, "--images")] == ["000.png", "001.png"]


def test_rank_folders_are_found_in_their_order(tmp_path):
    assert find_rank_folders(write_images(tmp_path / "plain", 1)) == []
    for rank in range(11):
        write_images(tmp_path / "ranks" / str(rank), 1)
    assert [path.name for path in find_rank_folders(tmp_path / "ranks")] == [str(rank) for rank in range(11)]
    (tmp_path / "ranks" / "3").rename(tmp_path / "ranks" / "12")
    with pytest.raises(ValueError, match="which are not 0 to 10; add the missing ones"):
        find_rank_folders(tmp_path / "ranks")


def test_crop_size_and_saving_change_the_image_as_they_say(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    image = Image.fromarray(pixels)
    image.save(path)
    assert np.array_equal(Preparation().load(path), pixels)
    assert np.array_equal(Preparation("center").load(path), pixels[:, 2:10])
    expected = Image.fromarray(pixels[:, 2:10]).resize((4, 4), Image.Resampling.BICUBIC)
    assert np.array_equal(Preparation("center", 4).load(path), np.asarray(expected))
    assert np.array_equal(Preparation("none", 4).load(path), np.asarray(image.resize((4, 4), Image.Resampling.BICUBIC)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    assert np.array_equal(Preparation(save="jpg:75").load(path), np.asarray(Image.open(buffer)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"save": "jpg"}, r"--save \(jpg\) must be png, or jpg:Q"),
        ({"save": "jpg:101"}, r"--save \(jpg:101\)"),
        ({"size": 0}, r"--size \(0\) must be at least 1"),
        ({"size": 10**6}, r"--size \(1000000\) must be at most 8192"),
        ({"crop": "left"}, r"--crop \(left\) must be one of none, center"),
    ],
)
def test_settings_that_do_not_exist_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**fields)
