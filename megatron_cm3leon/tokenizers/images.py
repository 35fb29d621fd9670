"""Images in and out: image files to RGB, RGB to the image tokenizer's pixels and back.

`load_image` reads the files of the web (palette, gray, 16-bit, CMYK, alpha, rotated by EXIF) as the RGB that a viewer
shows, alpha over white. It raises ValueError with the reason if a file cannot be read as an image.
Pixels are float32 [3, H, W] in [-1, 1].

Color profiles are ignored; the first frame of an animation is read. The reasons are written into the quarantine list of
preprocessing, so their wording is part of a file format.
"""

import io
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from megatron_cm3leon.tokenizers.image_kind import explain_no_image

Image.init()
FORMATS = tuple(
    kind
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
    if kind in Image.OPEN  # older Pillow has no AVIF
)
"""The decoders that are tried. Pillow has more, but some run other programs (EPS) on untrusted files."""

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition by EXIF orientation."""

MAX_PIXELS = 89_478_485
"""Larger images are refused: a small file can unpack to gigabytes. From this size on Pillow warns, too."""


def load_image(source: str | Path | bytes) -> Image.Image:
    """Read an image file, or its bytes, as RGB; ValueError says why it cannot be read."""
    name = "" if isinstance(source, bytes) else f"{source}: "
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{name}no such file.") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ValueError(f"{name}the image cannot be decoded: {error}") from error
    try:
        return _to_rgb(_decode(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}{explain_no_image(data, FORMATS)}.") from error
    except Exception as error:  # decoders meet arbitrary bytes and raise OSError, SyntaxError, struct.error ...
        raise ValueError(f"{name}the image cannot be decoded: {error or type(error).__name__}") from error


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are read")
        image.load()
        return _apply_orientation(image)


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Transpose by EXIF's orientation. Nothing else of EXIF is used, so damage in other tags has no effect."""
    try:
        method = _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, struct.error):  # Pillow's, for a damaged or short header: as viewers do, keep the stored form
        method = None
    return image.copy() if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; transparent parts show white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _gray_to_8_bits(image)
    if image.mode == "LAB":
        raise ValueError("its colors are LAB, which is not read; convert it to RGB")
    if image.mode in ("La", "LA", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _gray_to_8_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits (0..65535) or floats (0..1) to 8; Pillow's own conversion clips at 255."""
    values = np.asarray(image, dtype=np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise ValueError(
            f"gray values from {values.min():g} to {values.max():g} in mode {image.mode} are outside 0..{top:g}"
        )
    return Image.fromarray(np.round(values * (255.0 / top)).astype(np.uint8))


def to_pixels(image: Image.Image, size: int, fit: str = "crop") -> torch.Tensor:
    """RGB image to float32 [3, size, size] in [-1, 1].

    `fit` crop: the largest centered square, resized; pad: the whole image, resized, centered on a white square.
    """
    width, height = image.size
    if (width, height) != (size, size):
        image = _pad(image, size) if fit == "pad" else _crop(image, size)
    values_HWC = torch.from_numpy(np.array(image, dtype=np.float32))
    return (values_HWC / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _pad(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return square


def from_pixels(pixels: torch.Tensor) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] to an RGB image; values outside are clipped."""
    values = ((pixels.detach().float().cpu() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
