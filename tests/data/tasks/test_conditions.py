"""Condition images: what is drawn, the same bytes on every run, given maps, and each message."""

import hashlib
import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megatron_cm3leon.data.tasks import conditions


def draw(size=64):
    """A red square on gray and a blue triangle, whose gray levels differ little from the background's."""
    image = Image.new("RGB", (size, size), (90, 90, 90))
    pen, unit = ImageDraw.Draw(image), size // 16
    pen.rectangle((2 * unit, 2 * unit, 6 * unit, 6 * unit), fill=(255, 20, 20))
    pen.polygon([(9 * unit, 13 * unit), (14 * unit, 13 * unit), (11 * unit, 7 * unit)], fill=(20, 20, 255))
    return image


def pixels_of(image):
    return np.asarray(image).astype(int)


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", sorted(conditions.FUNCTIONS))
def test_every_run_gives_the_same_image_of_the_same_size(name):
    wide = draw().crop((0, 0, 64, 40))
    once, again = (conditions.get_condition(name)(wide.copy()) for _ in range(2))
    assert once.size == (64, 40) and once.mode == "RGB"
    assert hashlib.sha256(once.tobytes()).digest() == hashlib.sha256(again.tobytes()).digest()
    assert len(np.unique(pixels_of(once).reshape(-1, 3), axis=0)) > 1
    empty = pixels_of(conditions.get_condition(name)(Image.new("RGB", (64, 40), "white")))
    assert (empty == 0).all()  # nothing is drawn of an empty image


def test_canny_is_opencvs_and_sees_edges_of_color():
    import cv2

    image = draw()
    edges = pixels_of(conditions.compute_canny(image))[..., 0]
    assert (edges == cv2.Canny(np.asarray(image), 100, 200)).all()
    rows = np.flatnonzero(edges[:, 16])
    assert rows.min() in (7, 8) and 24 in rows  # upper and lower edge of the square


@pytest.mark.parametrize("size", [32, 64, 512])
def test_strokes_of_a_scribble_are_near_the_outlines(size):
    strokes = pixels_of(conditions.compute_scribble(draw(size)))[..., 0] > 0
    unit = size // 16
    inside = np.zeros_like(strokes)
    middle = slice(4 * unit, 5 * unit)
    inside[middle, middle] = True
    assert strokes[unit : 4 * unit, unit : 7 * unit].any() and strokes[7 * unit : 14 * unit, 9 * unit : 14 * unit].any()
    assert not strokes[inside].any()


def test_lines_lie_on_straight_edges():
    lines = pixels_of(conditions.compute_lines(draw(128)))[..., 0] > 0
    assert lines[16:49, 14:19].any(axis=1).mean() > 0.8  # the left edge of the square
    assert not lines[22:42, 22:42].any()


def test_segmentation_has_a_color_per_region():
    found = conditions.compute_segmentation(draw())
    colors = {found.getpixel(place) for place in ((16, 16), (45, 45), (60, 4))}
    assert len(colors) == 3 and (0, 0, 0) in colors  # the background is the largest region
    assert len(np.unique(pixels_of(found).reshape(-1, 3), axis=0)) <= 6


def test_colors_of_labels_are_distinct():
    labels = np.arange(256).reshape(16, 16)
    colors = pixels_of(conditions.color_labels(labels)).reshape(-1, 3)
    assert len(np.unique(colors, axis=0)) == 256
    assert colors[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]  # PASCAL VOC's


@pytest.mark.parametrize(
    "values",
    [
        np.array([[1000, 1500], [2000, 3000]], np.uint16),
        np.array([[0.1, 0.15], [0.2, 0.3]], np.float32),
        np.array([[10, 15], [20, 30]], np.uint8),
    ],
)
def test_depth_maps_of_any_precision(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "map.tiff")
    read = conditions.read_map((tmp_path / "map.tiff").read_bytes(), "map.tiff")
    near_is_large = pixels_of(conditions.draw_map("depth", read))[..., 1]
    assert np.abs(near_is_large - [[0, 63.75], [127.5, 255]]).max() <= 0.6
    assert (np.abs(near_is_large + pixels_of(conditions.draw_map("depth", read, invert=True))[..., 1] - 255) <= 1).all()
    flat = Image.new("L", (2, 2), 7)
    assert (pixels_of(conditions.draw_map("depth", flat)) == 0).all()


def test_maps_of_classes_and_of_normals():
    classes = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8))
    drawn = conditions.draw_map("segmentation", conditions.read_map(png(classes), "map.png"))
    assert pixels_of(drawn).reshape(-1, 3).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    colored = draw()
    assert conditions.draw_map("segmentation", colored).tobytes() == colored.tobytes()
    assert conditions.draw_map("normals", colored).tobytes() == colored.tobytes()


def test_a_function_of_ones_own(monkeypatch):
    monkeypatch.setattr(conditions, "FUNCTIONS", dict(conditions.FUNCTIONS))
    conditions.register("half", lambda image: image.resize((image.width // 2, image.height)))
    assert "half" in conditions.list_conditions()
    with pytest.raises(
        ValueError, match=r"the half condition has 32 x 64 pixels, but its image has 64 x 64; both must"
    ):
        conditions.get_condition("half")(draw())
    for name in ("half", "canny", "hed", "depth"):
        with pytest.raises(ValueError, match=rf"condition \('{name}'\) is already registered"):
            conditions.register(name, lambda image: image)


@pytest.mark.parametrize(
    ("values", "condition", "message"),
    [
        (Image.new("L", (2, 2)), "normals", "the map for normals has the mode L; it must be RGB"),
        (Image.new("F", (2, 2)), "segmentation", "mode F; it must be numbers of classes or RGB"),
        (draw(), "depth", "the map for depth has the mode RGB with colors; it must be gray"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "depth", "has values that are not finite"),
        (
            Image.fromarray(np.full((2, 2), -1, np.int32)),
            "segmentation",
            "has the class -1; classes must be at least 0",
        ),
        (draw(), "canny", r"condition \(canny\) is not drawn from a map; --map-field is for depth, normals"),
    ],
)
def test_maps_without_the_values_of_their_kind(values, condition, message):
    with pytest.raises(ValueError, match=message):
        conditions.draw_map(condition, values)


def test_messages(monkeypatch):
    with pytest.raises(ValueError, match=r"condition \('edges'\) must be one of: canny, depth, hed"):
        conditions.get_condition("edges")
    with pytest.raises(ValueError, match=r"condition \(depth\) cannot be computed from an image alone; give its maps"):
        conditions.get_condition("depth")
    with pytest.raises(ValueError, match=r"unreadable map: x.png: it is not an image of a known format"):
        conditions.read_map(b"no image", "x.png")
    with pytest.raises(ValueError, match=r"unreadable map: x.png: .*truncated"):
        conditions.read_map(png(draw(512))[:-900], "x.png")
    monkeypatch.setattr(conditions, "MAX_PIXELS", 10)
    with pytest.raises(ValueError, match=r"unreadable map: x.png: 64 x 64 pixels are more than the 10 that are read"):
        conditions.read_map(png(draw()), "x.png")
    for name in ("cv2", "skimage.segmentation", "controlnet_aux"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"condition \(canny\) requires opencv-python, .* pip install -c constraints"):
        conditions.get_condition("canny")(draw())
    with pytest.raises(ValueError, match=r"condition \(segmentation\) requires scikit-image"):
        conditions.get_condition("segmentation")(draw())
    with pytest.raises(ValueError, match=r"condition \(hed\) requires controlnet-aux, which cannot be imported"):
        conditions.get_condition("hed")
