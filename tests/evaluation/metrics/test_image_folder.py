"""Folders of images: what is listed, refused, and done to an image before a network sees it."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.evaluation.metrics.image_folder import Preparation, check_sizes, find_rank_folders, list_images
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
    with pytest.raises(ValueError, match=r"z\.png: the image cannot be read"):
        check_sizes(files, "--images", Preparation())


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
        ({"crop": "left"}, r"--crop \(left\) must be one of none, center"),
    ],
)
def test_settings_that_do_not_exist_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**fields)
