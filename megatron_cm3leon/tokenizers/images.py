"""Pictures in and out: any picture file to RGB, RGB to the image tokenizer's pixels and back.

`load_image` reads what the web holds (palette, grey, 16-bit, CMYK, alpha, rotated by EXIF) as the
RGB a viewer would show, alpha over white, and raises ValueError with the reason for what is no picture.
Pixels are float32 [3, H, W] in [-1, 1].

Colour profiles are ignored; of an animation the first frame is taken.
"""

import io
import warnings
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
"""The decoders that are tried. Pillow knows more, but some run other programs (EPS) on untrusted files."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientations mean."""

MAX_PIXELS = 89_478_485
"""Pictures above this are refused: a small file can unpack to gigabytes (Pillow's own warning level)."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of the same pictures


def load_image(source: str | Path | bytes) -> Image.Image:
    """Read an image file, or its bytes, as RGB; ValueError names why it cannot be read."""
    name = "" if isinstance(source, bytes) else f"{source}: "
    try:
        data = source if name == "" else Path(source).read_bytes()
        return _to_rgb(_decode(data))
    except FileNotFoundError as error:
        raise ValueError(f"{name}no such file.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}{explain_no_image(data, FORMATS)}.") from error
    except Exception as error:  # decoders meet arbitrary bytes and raise OSError, SyntaxError, struct.error ...
        raise ValueError(f"{name}the image cannot be decoded: {error or type(error).__name__}") from error


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are read")
        picture.load()
        return _turn(picture)


def _turn(picture: Image.Image) -> Image.Image:
    """As EXIF's orientation says. Nothing else of EXIF is used, so damage in other tags does no harm."""
    try:
        method = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever damaged bytes lead to: like viewers, show the image as it is stored
        method = None
    return picture.copy() if method is None else picture.transpose(method)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB; transparent parts show white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _grey_to_8_bits(picture)
    if picture.mode == "LAB":
        raise ValueError("its colours are LAB, which is not read; convert it to RGB")
    if picture.mode in ("La", "LA", "PA", "RGBa", "RGBA") or "transparency" in picture.info:
        if picture.mode == "La":
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _grey_to_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits (0..65535) or floats (0..1) to 8; Pillow's own conversion clips at 255."""
    values = np.asarray(picture, dtype=np.float64)
    top = 1.0 if picture.mode == "F" else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise ValueError(
            f"grey values from {values.min():g} to {values.max():g} in mode {picture.mode} are outside 0..{top:g}"
        )
    return Image.fromarray(np.round(values * (255.0 / top)).astype(np.uint8))


def to_pixels(picture: Image.Image, size: int, fit: str = "crop") -> torch.Tensor:
    """RGB picture to float32 [3, size, size] in [-1, 1].

    `fit` crop: the largest centred square, resized; pad: the whole picture, resized, in the middle of a white square.
    """
    width, height = picture.size
    if (width, height) != (size, size):
        picture = _pad(picture, size) if fit == "pad" else _crop(picture, size)
    values_HWC = torch.from_numpy(np.array(picture, dtype=np.float32))
    return (values_HWC / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _crop(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _pad(picture: Image.Image, size: int) -> Image.Image:
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new("RGB", (size, size), "white")
    square.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return square


def from_pixels(pixels: torch.Tensor) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] to an RGB picture; values outside are clipped."""
    values = ((pixels.detach().float().cpu() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
