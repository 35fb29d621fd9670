"""Renders drawings in parts, by several processes. A finished part is a file, so an interrupted run continues.

A part is named by a hash of all that it contains: a part of another size or of another package is another file.
"""

import hashlib
import io
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFont

from examples.emoji.generate import Emoji, find_file, list_font_paths, load_font, render
from examples.icons.drawings import Drawing
from megatron_cm3leon.common.progress import meter

PART_SIZE = 500
THUMBNAIL = 16
"""Width and height of the thumbnails in which near-duplicates are searched."""
BLANK_CONTRAST = 24
"""Levels of 0..255; an image whose brightest and darkest thumbnail pixels differ by less shows nothing."""
LONGEST_ASPECT = 4.0
"""A longer image, such as a banner or a line, is only some pixels high after scaling."""
LARGEST_PIXELS = 30_000_000
"""Pixels of a file; decoding a larger one takes seconds and a gigabyte."""
REASONS = ("", "not renderable", "blank", "too long", "too large")
"""Why a drawing has no image, by its status in a part; 0: it has one."""
_VERSIONS = {"svg": 1, "file": 2, "emoji": 1}
"""Raised when the same drawing of a kind gives another image."""


class CannotRenderError(Exception):
    """A drawing that its renderer refuses."""


class TooLargeError(Exception):
    """A file of more than LARGEST_PIXELS."""


@dataclass(frozen=True)
class Part:
    """Some drawings that one process renders; `path` is the file that says it is finished."""

    path: Path
    drawings: list[Drawing]
    size: int
    font: str


def make_parts(drawings: list[Drawing], folder: Path, size: int) -> list[Part]:
    """Divide `drawings` into parts whose files are in `folder`."""
    font = ""
    if any(drawing.kind == "emoji" for drawing in drawings):
        font = str(find_file("font", None, list_font_paths()))
    # A part has drawings of one source: a change of one source leaves the parts of the others as they are.
    groups = [list(group) for _, group in groupby(drawings, key=lambda drawing: drawing.source)]
    parts = []
    for some in (group[first : first + PART_SIZE] for group in groups for first in range(0, len(group), PART_SIZE)):
        rendered = [(drawing.key, drawing.kind, drawing.content) for drawing in some]
        content = repr([_VERSIONS[some[0].kind], size, rendered])
        digest = hashlib.sha256(content.encode()).hexdigest()[:20]
        parts.append(Part(folder / f"{digest}.npz", some, size, font))
    return parts


@cache
def _load_font(path: str) -> ImageFont.FreeTypeFont:
    return load_font(Path(path))


def draw(drawing: Drawing, size: int, font: str) -> Image.Image:
    """The image of a drawing, with its own proportions; RGBA or RGB, its longer side `size` pixels.

    Raises CannotRenderError with the reason of the renderer, TooLargeError for a file with too many pixels.
    """
    import resvg_py

    if drawing.kind == "emoji":
        image = render(Emoji(drawing.content, drawing.name, ""), _load_font(font), size)
        if image is None:
            raise CannotRenderError("the font does not have it as one glyph")
        return image
    try:
        if drawing.kind == "svg":
            content = resvg_py.svg_to_bytes(svg_string=drawing.content, width=size, height=size)
        elif drawing.content.endswith(".svg"):
            content = resvg_py.svg_to_bytes(svg_path=drawing.content, width=4 * size, height=4 * size)
        else:
            content = Path(drawing.content).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow refuses the largest by itself
            image = Image.open(io.BytesIO(content))
        with image:
            if image.width * image.height > LARGEST_PIXELS:
                raise TooLargeError
            rendered = image.convert("RGBA")
        if drawing.kind == "svg":
            return rendered
        # By a whole factor first: trimming and resampling a page of some megapixels takes a second.
        factor = max(rendered.size) // (4 * size)
        if factor > 1:
            rendered = rendered.convert("RGBa").reduce(factor).convert("RGBA")
        return _reduce(trim(rendered), size)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TooLargeError from error
    except (ValueError, OSError) as error:  # of resvg, of Pillow
        raise CannotRenderError(str(error)) from error


def trim(image: Image.Image) -> Image.Image:
    """An RGBA image without the margins that are transparent or white: clip art often fills a corner of its page."""
    page = Image.new("RGBA", image.size, "white")
    box = ImageChops.difference(Image.alpha_composite(page, image), page).convert("RGB").getbbox()
    return image.crop(box) if box else image


def _reduce(image: Image.Image, size: int) -> Image.Image:
    """The image with a longer side of `size` pixels; premultiplied, so colors of transparent pixels do not mix in."""
    factor = size / max(image.size)
    shape = tuple(max(1, round(side * factor)) for side in image.size)
    return image.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")


def on_white(image: Image.Image, size: int) -> Image.Image:
    """The image in the center of a white square."""
    canvas = Image.new("RGB", (size, size), "white")
    corner = ((size - image.width) // 2, (size - image.height) // 2)
    canvas.paste(image, corner, image if image.mode == "RGBA" else None)
    return canvas


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 [16, 16, 3]"""
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def render_part(part: Part, images: Path) -> None:
    """Write the images of a part below `images`, then the file of the part: `status` [drawings] and `thumbnails`
    [drawings, 16, 16, 3], both uint8."""
    status = np.zeros(len(part.drawings), np.uint8)
    thumbnails = np.zeros((len(part.drawings), THUMBNAIL, THUMBNAIL, 3), np.uint8)
    for number, drawing in enumerate(part.drawings):
        try:
            drawn = draw(drawing, part.size, part.font)
        except CannotRenderError:
            status[number] = REASONS.index("not renderable")
            continue
        except TooLargeError:
            status[number] = REASONS.index("too large")
            continue
        if max(drawn.size) > LONGEST_ASPECT * min(drawn.size):
            status[number] = REASONS.index("too long")
            continue
        image = on_white(drawn, part.size)
        thumbnails[number] = make_thumbnail(image)
        if np.ptp(thumbnails[number].reshape(-1, 3), axis=0).max() < BLANK_CONTRAST:
            status[number] = REASONS.index("blank")
            continue
        path = images / f"{drawing.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    temporary = part.path.with_name(f".{part.path.stem}-{os.getpid()}.npz")
    np.savez(temporary, status=status, thumbnails=thumbnails)
    temporary.replace(part.path)


def render_all(drawings: list[Drawing], output: Path, size: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Render what `output` does not have yet; returns the status and the thumbnails of all drawings.

    Images are output/images/KEY.png; the files of the parts are in output/parts/.
    """
    folder = output / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    parts = make_parts(drawings, folder, size)
    missing = [part for part in parts if not part.path.exists()]
    with meter(len(drawings), "render", "drawings") as progress:
        progress.advance(sum(len(part.drawings) for part in parts if part.path.exists()))
        for part in _render_in_processes(missing, output / "images", workers):
            progress.advance(len(part.drawings))
    files = [np.load(part.path) for part in parts]
    return np.concatenate([file["status"] for file in files]), np.concatenate([file["thumbnails"] for file in files])


def _render_in_processes(parts: list[Part], images: Path, workers: int) -> Iterator[Part]:
    """Yields each part when it is finished."""
    if workers == 1 or len(parts) < 2:
        for part in parts:
            render_part(part, images)
            yield part
        return
    # spawn: the bar of the progress has a thread, which a fork would not copy.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(render_part, part, images): part for part in parts}
        try:
            for future in as_completed(running):
                future.result()
                yield running[future]
        finally:  # after Ctrl-C, wait for the parts that are being rendered, not for all
            pool.shutdown(cancel_futures=True)
