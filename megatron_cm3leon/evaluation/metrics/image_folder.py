"""Folders of images that a metric reads: listing, rank folders of best-of-N, crop, size, and saving as PNG or JPEG.

What happens to an image before a network sees it changes a Fréchet distance more than the difference between two
models can: every step is an option, and is recorded with the figure.
"""

import hashlib
import io
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.generation.results import CONTACT_SHEET, RESULTS_FILE
from megatron_cm3leon.tokenizers.images import load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CROPS = ("none", "center")
LARGEST_SIDE = 8192
"""Pixels; larger squares than load_image reads are not made either."""
REPLACE = "replace the file, and repeat the command, which continues"
"""Remedy for a file that a list names, so that it cannot be removed."""
_TURNED = range(5, 9)
"""Values of EXIF's orientation with which height and width are exchanged."""


@dataclass(frozen=True)
class Preparation:
    """What happens to an image before it is resized to the input of a network, in this order."""

    crop: str = "none"
    """center: the largest centered square; none: the whole image."""
    size: int | None = None
    """Height and width in pixels that the image is resized to (bicubic, antialiased); None keeps its size."""
    save: str = "png"
    """png (no change), or jpg:Q: encoded as JPEG of quality Q and decoded, as if the image had been saved so."""

    def __post_init__(self) -> None:
        """ValueError for a value outside its range."""
        if self.crop not in CROPS:
            raise ValueError(f"--crop ({self.crop}) must be one of {', '.join(CROPS)}.")
        if self.size is not None and self.size < 1:
            raise ValueError(f"--size ({self.size}) must be at least 1 pixel.")
        if self.size is not None and self.size > LARGEST_SIDE:
            raise ValueError(f"--size ({self.size}) must be at most {LARGEST_SIDE} pixels.")
        self.quality()

    def quality(self) -> int | None:
        """JPEG quality of `save`; None for png."""
        if self.save == "png":
            return None
        kind, _, quality = self.save.partition(":")
        if kind != "jpg" or not quality.isdigit() or not 1 <= int(quality) <= 100:
            raise ValueError(f"--save ({self.save}) must be png, or jpg:Q with a quality Q from 1 to 100.")
        return int(quality)

    def load(self, path: Path) -> np.ndarray:
        """Read and prepare an image: uint8 [height, width, 3]; ValueError if it cannot be read."""
        image = read_image(path)
        width, height = image.size
        if self.crop == "center" and width != height:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if self.size is not None and image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if (quality := self.quality()) is not None:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            image = Image.open(buffer).convert("RGB")
        return np.array(image)


def read_image(path: Path, remedy: str = "remove or replace the file") -> Image.Image:
    """The image of a file as RGB; ValueError with the reason and the remedy if it cannot be read."""
    try:
        return load_image(path)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; {remedy}.") from error


def hash_images(folder: str | Path, files: Sequence[Path]) -> str:
    """SHA-256 of the names, relative to the folder, and contents of image files."""
    return hash_lines(identify_images(folder, files))


def identify_images(folder: str | Path, files: Sequence[Path]) -> list[str]:
    """A line for each image file: its name, relative to the folder, and the SHA-256 of its content."""
    return [f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n" for path in files]


def hash_lines(lines: Sequence[str]) -> str:
    """SHA-256 of lines of `identify_images`."""
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def list_images(folder: str | Path, option: str, minimum: int = 2) -> list[Path]:
    """Image files of a folder, sorted by name, without those of its subfolders and the sheet of tools/generate.py.

    Raises ValueError, which names the command-line `option`, for fewer than `minimum` images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{option} ({folder}) is not a folder; give a folder of images.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if (folder / RESULTS_FILE).is_file():
        files = [path for path in files if path.name != CONTACT_SHEET]
    if not files:
        raise ValueError(f"{option} ({folder}) holds no image ({', '.join(SUFFIXES)}); give a folder of images.")
    if len(files) < minimum:
        raise ValueError(
            f"{option} ({folder}) holds {len(files)} image, but a covariance requires at least {minimum}; "
            f"give a folder with more images."
        )
    return files


def find_rank_folders(folder: str | Path) -> list[Path]:
    """Subfolders 0..N-1 of best-of-N, in this order; an empty list if the folder has images or no subfolder "0".

    Raises ValueError if a number is missing.
    """
    folder = Path(folder)
    if not folder.is_dir() or any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
        return []
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    if numbers and numbers != list(range(len(numbers))):
        raise ValueError(
            f"{folder} has the rank folders {', '.join(map(str, numbers))}, which are not 0 to {len(numbers) - 1}; "
            f"add the missing ones."
        )
    return [folder / str(number) for number in numbers]


def check_sizes(files: Sequence[Path], option: str, preparation: Preparation) -> None:
    """Raise ValueError for images of several sizes, unless --size resizes them to one, and for unreadable files."""
    if preparation.size is not None:
        return
    sizes: Counter = Counter()
    for path in files:
        sizes[_read_size(path)] += 1
    if len(sizes) > 1:
        shown = ", ".join(f"{n} of {width}x{height}" for (width, height), n in sizes.most_common(3))
        raise ValueError(
            f"{option} ({files[0].parent}) holds images of {len(sizes)} sizes ({shown}{', ...' * (len(sizes) > 3)}); "
            f"give --size, and --crop center to keep their shape."
        )


def _read_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as it is shown; only the file's header is read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            try:
                turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
            except (SyntaxError, struct.error):  # damaged EXIF: load_image, too, keeps the stored form
                turned = False
    except Exception as error:  # decoders meet arbitrary bytes and raise OSError, SyntaxError, DecompressionBombError
        raise ValueError(f"{path}: the image cannot be read ({error}); remove or replace the file.") from error
    return (height, width) if turned else (width, height)
