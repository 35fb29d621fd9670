"""Every kind of image file becomes the RGB that a viewer shows; the error of a damaged one says what is wrong."""

import io
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_cm3leon.tokenizers import images
from megatron_cm3leon.tokenizers.images import from_pixels, load_image, to_pixels

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def draw_noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def load_pixel(data: bytes, position=(0, 0)) -> tuple:
    image = load_image(data)
    assert image.mode == "RGB"
    return image.getpixel(position)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM"])
def test_common_formats(kind):
    found = load_pixel(encode(Image.new("RGB", (8, 6), RED), kind))
    assert np.abs(np.subtract(found, RED)).max() <= 3


@pytest.mark.parametrize("mode, value, expected", [("L", 100, 100), ("1", 1, 255), ("I;16", 100 * 257, 100)])
def test_gray_modes(mode, value, expected):
    assert load_pixel(encode(Image.new(mode, (4, 4), value))) == (expected,) * 3


@pytest.mark.parametrize("mode, value, expected", [("I", 65535, 255), ("F", 0.5, 128), ("I;16B", 257, 1)])
def test_gray_tiff_of_more_than_8_bits(mode, value, expected):
    assert load_pixel(encode(Image.new(mode, (4, 4), value), "TIFF")) == (expected,) * 3


def test_gray_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"gray values from 70000 to 70000 in mode I are outside 0\.\.65535"):
        load_image(encode(Image.new("I", (4, 4), 70000), "TIFF"))


def test_palette():
    assert load_pixel(encode(Image.new("RGB", (4, 4), RED).convert("P"))) == RED


def test_transparent_pixels_show_a_white_background():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert load_pixel(encode(image)) == RED
    assert load_pixel(encode(image), (1, 0)) == WHITE
    half = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))
    assert load_pixel(half) == (127, 127, 127)


def test_gray_with_alpha_and_palette_with_alpha():
    assert load_pixel(encode(Image.new("LA", (2, 2), (0, 0)))) == WHITE
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert load_pixel(encode(palette)) == RED
    assert load_pixel(encode(palette, transparency=1)) == WHITE


def test_transparent_color_of_an_rgb_png():
    assert load_pixel(encode(Image.new("RGB", (2, 2), RED), transparency=RED)) == WHITE


def test_cmyk():
    assert np.abs(np.subtract(load_pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")), RED)).max() <= 3


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (4, 2), WHITE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    shown = load_image(encode(image, exif=exif))
    assert shown.size == (2, 4)
    assert shown.getpixel((1, 0)) == RED


def build_exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of (tag, type, count, four bytes of value), as the programs of cameras write it."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


SHORT, ASCII, LONG, UNDEFINED = 3, 2, 4, 7
ODD_TAGS = [
    [(0x128, UNDEFINED, 4, b"abcd"), (0x131, SHORT, 1, b"\5\0")],
    [(0x11A, ASCII, 4, b"72"), (0x9000, SHORT, 1, b"\2\0")],
    [(0x132, LONG, 1, b"\1\0"), (0x8769, ASCII, 4, b"x")],
    [(0x8825, LONG, 1, b"\xff\xff\xff\xff"), (0x829A, 99, 1, b"x")],
]


@pytest.mark.parametrize("tags", ODD_TAGS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied_with_any_other_tags(tags, kind):
    image = Image.new("RGB", (32, 16), WHITE)
    image.paste(RED, (0, 0, 16, 16))
    positions = {1: (4, 8), 2: (28, 8), 3: (28, 8), 4: (4, 8), 5: (8, 4), 6: (8, 4), 7: (8, 28), 8: (8, 28)}
    for orientation, position in positions.items():
        exif = build_exif((0x112, SHORT, 1, bytes([orientation, 0])), *tags)
        shown = load_image(encode(image, kind, exif=exif))
        assert shown.size == ((32, 16) if orientation < 5 else (16, 32))
        assert np.abs(np.subtract(shown.getpixel(position), RED)).max() <= 3, orientation


@pytest.mark.parametrize(
    "exif",
    [
        build_exif((0x112, ASCII, 2, b"6")),
        build_exif((0x112, SHORT, 1, b"\x63\0")),
        build_exif((0x112, SHORT, 1, b"\6\0"))[:17],
        b"Exif\0\0no TIFF header at all",
        b"Exif\0\0",
    ],
)
def test_an_orientation_that_cannot_be_read_is_ignored(exif):
    assert load_image(encode(Image.new("RGB", (8, 4), RED), "JPEG", exif=exif)).size == (8, 4)


def build_heif(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + bytes(200)


@pytest.mark.parametrize(
    "data, reason",
    [
        (build_heif(b"heic"), "its format is HEIC, which is not decoded; convert it to PNG or JPEG."),
        (build_heif(b"mif1"), "its format is HEIC,"),
        (b"\xff\x0a" + bytes(9), "its format is JPEG XL,"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "its format is JPEG XL,"),
        (b"\xef\xbb\xbf <?xml version='1.0'?><!-- x --><SVG/>", "its format is SVG,"),
        (b"8BPS\0\1", "its format is Photoshop"),
        (b"qoif" + bytes(20), "its format is QOI,"),
        (build_heif(b"isom"), "not an image but a video."),
        (b"\n<!DOCTYPE html><html>", "not an image but an HTML page."),
        (b"<?xml version='1'?><Error><Code>AccessDenied", 'not an image but a text that begins with b"<?xml'),
        (b'{"error": 404}', "not an image but a text that begins with b'{"),
        (bytes(5000), "not an image but 5,000 zero bytes."),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image but a pointer of Git LFS; fetch"),
        (b"\x1f\x8b\x08" + bytes(20), "not an image but a gzip file; unpack it."),
        (b"\0\5\x16\7" + bytes(20), "not an image but an AppleDouble file"),
        (encode(draw_noise()).replace(b"\r\n", b"\n"), "not an image but a PNG whose line ends were converted"),
        (encode(draw_noise()).decode("latin-1").encode(), "not an image but a PNG that was saved as text in UTF-8"),
        (encode(draw_noise()).decode(errors="replace").encode(), "not an image but a file that was saved as text"),
        (b"xx", "not an image in any of the formats PNG, JPEG"),
        (b"Forbidden", "not an image in any of the formats PNG, JPEG"),
    ],
)
def test_the_error_names_what_a_file_without_an_image_is(data, reason):
    with pytest.raises(ValueError, match="^" + re.escape(reason)):
        load_image(data)


def test_the_error_names_the_damage():
    with_text = encode(Image.new("RGB", (4, 4)), pnginfo=build_text_chunk())
    start = with_text.index(b"tEXt")
    header = encode(Image.new("RGB", (4, 4)))
    for data, reason in {
        with_text[: start + 6] + b"X" + with_text[start + 7 :]: "damaged PNG: broken PNG file.*checksum in b'tEXt'",
        header[:20] + b"X" + header[21:]: "damaged PNG: broken PNG file.*checksum in b'IHDR'",
        header[:12]: "damaged PNG: ",
        encode(draw_noise(), "JPEG")[:10]: "the image cannot be decoded: Truncated File Read",
        encode(draw_noise(), "WEBP")[:40]: "cannot be decoded|damaged WEBP",
        b"GIF89a": "damaged GIF: ",
        b"BM" + bytes(9): "damaged BMP: |cannot be decoded",
    }.items():
        with pytest.raises(ValueError, match=reason):
            load_image(data)


def build_text_chunk() -> PngInfo:
    text = PngInfo()
    text.add_text("Comment", "written by a program")
    return text


def test_the_first_frame_of_an_animation_is_loaded_from_a_path(tmp_path):
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), WHITE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(kind, share):
    data = encode(draw_noise(), kind)
    with pytest.raises(ValueError, match=r"cannot be decoded|damaged"):
        load_image(data[: int(len(data) * share)])


def test_damaged_bytes_raise_only_value_errors():
    data = bytearray(encode(draw_noise(16)))
    random = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(data)
        for position in random.integers(0, len(damaged), 3):
            damaged[position] = random.integers(0, 256)
        try:
            load_image(bytes(damaged))
        except ValueError as error:
            assert any(word in str(error) for word in ("cannot be decoded", "damaged PNG", "not an image"))


def test_reasons_are_readable(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is no picture")
    with pytest.raises(ValueError, match=r"empty\.png: .*0 bytes"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(
        ValueError, match=r"text\.png: not an image in any of the formats PNG, .*; it begins with b'this is no p'"
    ):
        load_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"absent\.png: no such file"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match=r"the image cannot be decoded: .*Is a directory"):
        load_image(tmp_path)


def test_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="11 x 10 pixels are more than the 100"):
        load_image(encode(Image.new("RGB", (11, 10))))


def test_a_decompression_bomb_is_refused():
    data = encode(Image.new("1", (20000, 10000)))
    assert len(data) < 100_000
    with pytest.raises(ValueError, match="pixels"):
        load_image(data)


def test_postscript_is_refused_without_running_a_program():
    with pytest.raises(ValueError, match=r"its format is PostScript \(EPS\), which is not decoded; convert it"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_pixels_round_trip_every_value():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values[::-1], values.T], axis=-1))
    tensor = to_pixels(image, 16)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(from_pixels(tensor)), np.asarray(image))


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (5, 3), (1, 1), (3000, 1)])
def test_other_sizes_are_cropped_to_the_center_and_resized(size):
    image = Image.new("RGB", size, WHITE)
    assert torch.equal(to_pixels(image, 16), torch.ones(3, 16, 16))


def test_the_crop_is_centered():
    image = Image.new("RGB", (30, 10), RED)
    image.paste(WHITE, (10, 0, 20, 10))
    assert torch.equal(to_pixels(image, 10), torch.ones(3, 10, 10))


def test_from_pixels_clips_values():
    assert from_pixels(torch.full((3, 1, 1), 5.0)).getpixel((0, 0)) == WHITE
