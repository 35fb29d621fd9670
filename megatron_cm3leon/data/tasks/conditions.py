"""Condition images: what an image is drawn from beside its caption (edges, strokes, regions), as named functions.

A condition is a function of one RGB image that returns an RGB image of the same size: the same bytes for the same image
on every run. There are three kinds:

    computed   canny, scribble, lines, segmentation: from the image alone, with OpenCV and scikit-image (extra `sft`)
    given      depth, normals, segmentation: from a map of the image that the user has (`draw_map`)
    detected   hed, pose, midas ...: by a network of controlnet-aux, where that package and its weights are installed

`register` adds a function of one's own.
"""

import importlib
import io
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_cm3leon.tokenizers.images import FORMATS, MAX_PIXELS

Function = Callable[[Image.Image], Image.Image]

CANNY_THRESHOLDS = 100, 200
"""Gradients of cv2.Canny, as ControlNet's annotator has them."""
SCRIBBLE_SIZE = 128
"""Shorter side, in pixels, to which an image is reduced before the strokes of a scribble are found."""
SCRIBBLE_THRESHOLDS = 50, 150
SCRIBBLE_TOLERANCE = 1 / 64
"""Distance between an outline and its stroke, at most, as a share of the shorter side."""
SEGMENTS = 400
"""Superpixels of SLIC, before similar neighbors are merged."""
MERGE_DISTANCE = 24.0
"""Distance of mean RGB colors, in levels of 0..255, below which neighboring superpixels are one region."""
WEIGHTS = "lllyasviel/Annotators"
"""Repository on the Hugging Face hub, or folder, with the weights of controlnet-aux's detectors."""

DETECTORS = {
    "hed": "HEDdetector",
    "lineart": "LineartDetector",
    "midas": "MidasDetector",
    "mlsd": "MLSDdetector",
    "normal-bae": "NormalBaeDetector",
    "pidinet": "PidiNetDetector",
    "pose": "OpenposeDetector",
    "zoe": "ZoeDetector",
}
"""Condition -> class of controlnet-aux."""
MAPS = ("depth", "normals", "segmentation")
"""Conditions that `draw_map` draws from a given map."""


def compute_canny(image: Image.Image) -> Image.Image:
    """Edges, white on black, one pixel wide: cv2.Canny of the RGB image, so that an edge in any channel counts."""
    edges = _import("cv2", "canny").Canny(np.asarray(image.convert("RGB")), *CANNY_THRESHOLDS)
    return Image.fromarray(edges).convert("RGB")


def compute_scribble(image: Image.Image) -> Image.Image:
    """Strokes as a child draws them, white on black: the outlines of a reduced and blurred image as thick,
    simplified polygons."""
    cv2 = _import("cv2", "scribble")
    size = min(image.size)
    scale = min(1.0, SCRIBBLE_SIZE / size)
    reduced = cv2.resize(np.asarray(image.convert("RGB")), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    edges = cv2.Canny(cv2.GaussianBlur(reduced, (0, 0), max(0.5, scale * size / 100)), *SCRIBBLE_THRESHOLDS)
    outlines, _ = cv2.findContours(edges, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    tolerance = max(1.0, scale * size * SCRIBBLE_TOLERANCE)
    strokes = np.zeros((image.height, image.width), np.uint8)
    for outline in outlines:
        if cv2.arcLength(outline, True) < 4 * tolerance:
            continue  # a speck
        corners = np.round(cv2.approxPolyDP(outline, tolerance, True) / scale).astype(np.int32)
        cv2.polylines(strokes, [corners], True, 255, max(1, round(size / 64)))
    return Image.fromarray(strokes).convert("RGB")


def compute_lines(image: Image.Image) -> Image.Image:
    """Straight lines, white on black: OpenCV's line segment detector on each color channel."""
    cv2 = _import("cv2", "lines")
    detector = cv2.createLineSegmentDetector()
    drawn = np.zeros((image.height, image.width), np.uint8)
    for channel in cv2.split(np.asarray(image.convert("RGB"))):
        segments = detector.detect(channel)[0]
        for start_x, start_y, end_x, end_y in [] if segments is None else segments.reshape(-1, 4).round().astype(int):
            cv2.line(drawn, (int(start_x), int(start_y)), (int(end_x), int(end_y)), 255, 1)
    return Image.fromarray(drawn).convert("RGB")


def compute_segmentation(image: Image.Image) -> Image.Image:
    """Regions of similar color without classes: SLIC's superpixels, similar neighbors merged; the larger of two
    regions has the earlier color of the palette."""
    segmentation, graph = (_import(f"skimage.{name}", "segmentation") for name in ("segmentation", "graph"))
    pixels = np.asarray(image.convert("RGB"))
    segments = min(SEGMENTS, pixels.shape[0] * pixels.shape[1] // 16 + 1)
    labels = segmentation.slic(pixels, segments, compactness=5.0, sigma=0, start_label=0)
    labels = graph.cut_threshold(labels, graph.rag_mean_color(pixels, labels), MERGE_DISTANCE)
    _, regions, areas = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(areas), np.int64)
    rank[np.argsort(-areas, kind="stable")] = np.arange(len(areas))
    return color_labels(rank[regions.reshape(labels.shape)])


def color_labels(labels: np.ndarray) -> Image.Image:
    """An RGB image of region or class numbers, integers [height, width] of at least 0; 0 is black."""
    return Image.fromarray(_build_palette(int(labels.max()) + 1)[labels])


@lru_cache(8)
def _build_palette(colors: int) -> np.ndarray:
    """`colors` distinct colors, uint8 [colors, 3]: black, then the corners and the finer and finer points of the RGB
    cube, as PASCAL VOC has them: bits 0, 3, 6 of a number are the highest bits of red, and so on."""
    numbers = np.arange(colors)
    palette = np.zeros((colors, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


FUNCTIONS: dict[str, Function] = {
    "canny": compute_canny,
    "lines": compute_lines,
    "scribble": compute_scribble,
    "segmentation": compute_segmentation,
}
"""Condition -> function, without the detectors."""


def register(name: str, function: Function) -> None:
    """Add a condition; ValueError if the name is taken."""
    if name in FUNCTIONS or name in DETECTORS or name in MAPS:
        raise ValueError(f"condition ({name!r}) is already registered; choose another name.")
    FUNCTIONS[name] = function


def list_conditions() -> tuple[str, ...]:
    """Names of all conditions, installed or not."""
    return tuple(sorted({*FUNCTIONS, *DETECTORS, *MAPS}))


def get_condition(name: str, weights: str = WEIGHTS) -> Function:
    """The function of a condition; its result has the size of its image, or it raises ValueError.

    `weights`: repository or folder with the weights of a detector. ValueError if the name is unknown, if the condition
    can only be given as a map, and if its package or weights are missing.
    """
    if name in FUNCTIONS:
        function = FUNCTIONS[name]
    elif name in DETECTORS:
        function = _load_detector(name, weights)
    elif name in MAPS:
        raise ValueError(
            f"condition ({name}) cannot be computed from an image alone; give its maps with --map-field, or use midas "
            f"or normal-bae of controlnet-aux."
        )
    else:
        raise ValueError(f"condition ({name!r}) must be one of: {', '.join(list_conditions())}.")

    def compute(image: Image.Image) -> Image.Image:
        condition = function(image)
        check_same_size(condition, image, name)
        return condition

    return compute


def check_same_size(condition: Image.Image, image: Image.Image, name: str) -> None:
    """ValueError if a condition image and its image have different sizes: their places would not correspond."""
    if condition.size != image.size:
        shown, expected = (" x ".join(map(str, each.size)) for each in (condition, image))
        raise ValueError(
            f"the {name} condition has {shown} pixels, but its image has {expected}; both must have the same size."
        )


def read_map(content: bytes, name: str) -> Image.Image:
    """A map of an image from the bytes of its file, with the values that the file has; ValueError if it cannot be read.

    `name`: for messages.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} that are read"
                )
            image.load()
            return image.copy()
    except UnidentifiedImageError as error:
        raise ValueError(f"unreadable map: {name}: it is not an image of a known format") from error
    except Exception as error:  # decoders meet arbitrary bytes and raise OSError, SyntaxError, struct.error ...
        raise ValueError(f"unreadable map: {name}: {error or type(error).__name__}") from error


def draw_map(condition: str, values: Image.Image, invert: bool = False) -> Image.Image:
    """The RGB condition image of a map.

    depth: gray values of any depth (8 or 16 bits, or floats), scaled to 0..255 by their own range, near as bright as
    possible; `invert` for maps of distances, whose near values are the small ones. normals: RGB, as it is.
    segmentation: numbers of classes (a palette or gray image), colored by `color_labels`, or RGB as it is. ValueError
    for another condition, and for a map without values of its kind.
    """
    if condition == "depth":
        return _draw_depth(values, invert)
    if condition == "segmentation" and (values.mode in ("L", "P", "1") or values.mode.startswith("I")):
        labels = np.asarray(values).astype(np.int64)
        if labels.min() < 0:
            raise ValueError(f"the segmentation map has the class {labels.min()}; classes must be at least 0.")
        return color_labels(labels)
    if condition in ("normals", "segmentation"):
        if values.mode not in ("RGB", "RGBA"):
            kinds = "RGB" if condition == "normals" else "numbers of classes or RGB"
            raise ValueError(f"the map for {condition} has the mode {values.mode}; it must be {kinds}.")
        return values.convert("RGB")
    raise ValueError(f"condition ({condition}) is not drawn from a map; --map-field is for {', '.join(MAPS)}.")


def _draw_depth(values: Image.Image, invert: bool) -> Image.Image:
    depth = np.asarray(values).astype(np.float64)
    if depth.ndim == 3:
        if values.mode != "RGB" or not (depth == depth[..., :1]).all():
            raise ValueError(f"the map for depth has the mode {values.mode} with colors; it must be gray.")
        depth = depth[..., 0]
    if not np.isfinite(depth).all():
        raise ValueError("the map for depth has values that are not finite; fill them first.")
    low, high = depth.min(), depth.max()
    share = (depth - low) / (high - low) if high > low else np.zeros_like(depth)
    return Image.fromarray(np.round(255 * (1 - share if invert else share)).astype(np.uint8)).convert("RGB")


def _import(module: str, condition: str) -> ModuleType:
    """A package of the extra `sft`; ValueError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"cv2": "opencv-python"}.get(module, "scikit-image")
        raise ValueError(
            f"condition ({condition}) requires {package}, which cannot be imported ({error}); install it with "
            f'pip install -c constraints.txt -e ".[sft]".'
        ) from error


def _load_detector(name: str, weights: str) -> Function:
    try:
        detectors = importlib.import_module("controlnet_aux")
    except ImportError as error:
        raise ValueError(
            f"condition ({name}) requires controlnet-aux, which cannot be imported ({error}); pip install "
            f"controlnet-aux, or give the condition images as a field of the records."
        ) from error
    try:
        detector = getattr(detectors, DETECTORS[name]).from_pretrained(weights)
    except (OSError, ValueError) as error:  # huggingface_hub: no network, no such repository or file
        raise ValueError(
            f"condition ({name}): the weights of controlnet-aux cannot be read from {weights}: {error}; give a folder "
            f"that has them with --weights."
        ) from error

    def detect(image: Image.Image) -> Image.Image:
        size = min(image.size)
        found = detector(image.convert("RGB"), detect_resolution=size, image_resolution=size, output_type="pil")
        # Its results have multiples of 64 pixels.
        return found.convert("RGB").resize(image.size, Image.Resampling.BILINEAR)

    return detect
