"""Text drawn in images, read back by an OCR model: character and word error rates.

    --images FILE.jsonl    one {"image", "text"} per line, image paths relative to the file
    --images FOLDER        images, each with a .txt file of the same name beside it

The OCR model is RapidOCR with the PP-OCRv4 weights of its wheel. It reads Latin letters, digits and Chinese; lines are
joined from top to bottom. An image whose shorter side is below `--shortest-side` is enlarged first: the model finds
letters of about 10 pixels and more.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rapidocr_onnxruntime
from PIL import Image
from rapidocr_onnxruntime import RapidOCR

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.common.progress import track
from megatron_cm3leon.evaluation.metrics.image_folder import read_image
from megatron_cm3leon.evaluation.metrics.read_back import CASES, measure_error_rates, normalize_text
from megatron_cm3leon.evaluation.result import FinishedItems, Result, hash_input, read_versions
from megatron_cm3leon.evaluation.text_files import read_objects, read_text
from megatron_cm3leon.tokenizers.images import MAX_PIXELS

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHOWN = 24
"""Images that a report shows."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    add = parser.add_argument
    add("--images", type=user_path, required=True, help="JSON Lines of image and text, or folder of images with .txt")
    add("--case", choices=CASES, default="keep", help="whether upper and lower case are distinguished")
    add("--shortest-side", type=int, default=256, help="pixels; smaller images are enlarged to it")
    add("--seed", type=int, default=0, help="of the bootstrap intervals")


def evaluate(
    *, images: str | Path, output: str | Path, case: str = "keep", shortest_side: int = 256, seed: int = 0
) -> Result:
    """Read the images and compare; the options are those of `add_options`.

    Figures: those of `measure_error_rates`. ValueError for an image without a text, a text without an image, and an
    image that cannot be read.
    """
    if case not in CASES:
        raise ValueError(f"--case ({case!r}) must be one of: {', '.join(CASES)}.")
    if shortest_side < 1:
        raise ValueError(f"--shortest-side ({shortest_side}) must be at least 1 pixel.")
    pairs = read_pairs(images)
    for path, expected in pairs:
        if not normalize_text(expected):
            raise ValueError(f"the text of {path} ({expected!r}) is empty; give the text that the image shows.")
    settings = {"case": case, "shortest_side": shortest_side}
    inputs = {"texts": _hash_pairs(pairs), "ocr_weights": hash_input(_weights())}
    finished = FinishedItems(output, {"settings": settings, "inputs": inputs, "seed": seed})
    try:
        _read_images([path for path, _ in pairs], shortest_side, finished)
        found = [finished.items[str(path)]["found"] for path, _ in pairs]
    finally:
        finished.close()
    texts = [
        (normalize_text(expected, case), normalize_text(text, case))
        for (_, expected), text in zip(pairs, found, strict=True)
    ]
    rows = [
        {"path": str(path.resolve()), "caption": expected, "note": f"read: {text or 'nothing'}"}
        for (path, _), (expected, text) in zip(pairs[:SHOWN], texts, strict=False)
    ]
    return Result(
        task="ocr",
        figures=measure_error_rates(texts, seed),
        settings=settings,
        seed=seed,
        inputs=inputs,
        versions=read_versions(("rapidocr-onnxruntime", "onnxruntime", "rapidfuzz")),
        tables={"images": rows},
    )


def _weights() -> Path:
    """Folder of the OCR model's weights, in its wheel."""
    return Path(rapidocr_onnxruntime.__file__).with_name("models")


def _hash_pairs(pairs: list[tuple[Path, str]]) -> str:
    """SHA-256 of the images and texts, in their order."""
    lines = [json.dumps([hash_input(path), text]) for path, text in pairs]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_pairs(source: str | Path) -> list[tuple[Path, str]]:
    """(image file, text that it shows) of a JSON Lines file or a folder; ValueError where one of them is missing."""
    source = Path(source)
    if source.is_dir():
        return _read_folder(source)
    if not source.is_file():
        raise ValueError(f"--images ({source}) must be a JSON Lines file or a folder of images with .txt files.")
    pairs = []
    for number, entry in read_objects(source):
        image, text = entry.get("image"), entry.get("text")
        if not isinstance(image, str) or not isinstance(text, str):
            raise ValueError(f"{source}:{number}: image ({image!r}) and text ({text!r}) must be texts; give both.")
        if not (source.parent / image).is_file():
            raise ValueError(f"{source}:{number}: there is no image at {source.parent / image}.")
        pairs.append((source.parent / image, text))
    if not pairs:
        raise ValueError(f"{source} has no images; give at least one line.")
    return pairs


def _read_folder(folder: Path) -> list[tuple[Path, str]]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    if not images:
        raise ValueError(f"{folder} has no images ({', '.join(IMAGE_ENDINGS)}); give a folder with at least one.")
    for path in images:
        if not path.with_suffix(".txt").is_file():
            raise ValueError(
                f"{path} has no text: there is no {path.with_suffix('.txt').name} beside it; write it there."
            )
    orphans = sorted({path.stem for path in folder.glob("*.txt")} - {path.stem for path in images})
    if orphans:
        raise ValueError(f"{folder / orphans[0]}.txt is a text without an image; remove it, or add the image.")
    return [(path, read_text(path.with_suffix(".txt"))) for path in images]


def _read_images(paths: Iterable[Path], shortest_side: int, finished: FinishedItems) -> None:
    """Read the images that are not finished."""
    missing = [path for path in paths if str(path) not in finished.items]
    reader = RapidOCR() if missing else None
    for path in track(missing, label="reading", unit="images"):
        assert reader is not None
        image = read_image(path)
        scale = shortest_side / min(image.size)
        if scale**2 * image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{path}: its shorter side has {min(image.size)} pixels, and enlarged to --shortest-side "
                f"({shortest_side}) it has more than {MAX_PIXELS:,} pixels; lower --shortest-side, or remove the image."
            )
        if scale > 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        lines, _ = reader(np.asarray(image)[:, :, ::-1])  # it expects blue, green, red
        finished.add(str(path), {"found": " ".join(line[1] for line in lines or [])})
