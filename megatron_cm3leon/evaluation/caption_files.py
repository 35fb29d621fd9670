"""Files of captions: generated ones, one per image, and references, several per image.

    generated   COCO results     [{"image_id": 7, "caption": "a red circle"}, ...]
                JSON Lines       {"image_id": "7", "caption": "a red circle"}
    references  COCO annotations {"annotations": [{"image_id": 7, "caption": "a circle that is red"}, ...], ...}
                JSON Lines       {"image_id": "7", "captions": ["a circle that is red", "a red disk"], "image": "7.png"}

In JSON Lines the id is `image_id`, `id` or else `image`; a single reference may be a `caption`. `references`, as the
corpus of examples/icons has them beside the caption of training, are read as `captions` are. `image` is a path,
relative to the file, and only needed to generate captions. Ids are compared as texts: 7 and "7" are the same image.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.data.sources.documents import decode_text

_ID_FIELDS = ("image_id", "id", "image")
_REFERENCE_FIELDS = ("captions", "references")
_SHOWN = 3


@dataclass(frozen=True)
class References:
    """The references of images."""

    captions: dict[str, list[str]]
    """References of each image, by its id."""
    images: dict[str, Path] = field(default_factory=dict)
    """Image files, by id, where the file names them."""


def read_captions(path: str | Path) -> dict[str, str]:
    """Generated captions by image id; ValueError for a file that is not of the forms above, and for duplicate ids."""
    path = Path(path)
    rows = _read_rows(path)
    if isinstance(rows, dict):
        raise ValueError(f"{path} has annotations, so it holds references; give it as --references.")
    captions: dict[str, str] = {}
    for place, row in rows:
        key = _read_id(row, place)
        if key in captions:
            raise ValueError(f"{place} has a second caption for the image {key!r}; one per image is scored.")
        captions[key] = _read_text(row.get("caption"), place, "caption")
    return captions


def read_references(path: str | Path) -> References:
    """References of images; ValueError for a file that is not of the forms above, and for duplicate ids."""
    path = Path(path)
    rows = _read_rows(path)
    if isinstance(rows, dict):
        return References(_read_annotations(rows, path))
    captions: dict[str, list[str]] = {}
    images: dict[str, Path] = {}
    for place, row in rows:
        key = _read_id(row, place)
        if key in captions:
            raise ValueError(
                f"{place} has the image {key!r} for a second time; give an image's references in one line, as captions."
            )
        captions[key] = _read_reference_texts(row, place)
        if isinstance(row.get("image"), str):
            images[key] = path.parent / row["image"]
    return References(captions, images)


def match_images(captions: dict[str, str], references: dict[str, list[str]], allow_missing: bool) -> list[str]:
    """Ids of the images to score, in the references' order; ValueError unless both have the same images.

    With `allow_missing` images without a caption are not scored, as pycocoevalcap does.
    """
    unknown = [key for key in captions if key not in references]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(captions)} captions are of images without references ({_show(unknown)}); remove "
            f"them, or give the references of these images."
        )
    missing = [key for key in references if key not in captions]
    if missing and not allow_missing:
        raise ValueError(
            f"{len(missing)} of {len(references)} images have no caption ({_show(missing)}); add captions, or give "
            f"--allow-missing to score only the images that have one."
        )
    return [key for key in references if key in captions]


def write_coco_results(path: Path, captions: dict[str, str]) -> None:
    """Write captions as COCO results, which other tools score; ids that are whole numbers are written as numbers."""
    numbers = all(key.isascii() and key.isdigit() and str(int(key)) == key for key in captions)
    rows = [{"image_id": int(key) if numbers else key, "caption": text} for key, text in captions.items()]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_rows(path: Path) -> dict | list[tuple[str, dict]]:
    """The object of COCO annotations; else the rows of COCO results or JSON Lines, each with its place in the file."""
    if not path.is_file():
        raise ValueError(f"there is no file at {path}.")
    text = decode_text(path.read_bytes(), str(path)).strip()
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if isinstance(content, dict) and "annotations" in content:
        return content
    if isinstance(content, list):
        rows = [(f"entry {number} of {path}", row) for number, row in enumerate(content)]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"line {number} of {path}", _parse_line(line, number, path)) for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no captions; COCO's JSON or JSON Lines with image_id and caption is required.")
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is {json.dumps(row)[:80]}; an object with image_id and caption is required.")
    return rows


def _parse_line(line: str, number: int, path: Path) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not valid JSON ({error}); give one object per line.") from error


def _read_annotations(content: dict, path: Path) -> dict[str, list[str]]:
    """References by image id, from COCO annotations; ids of images and of annotations must be unique."""
    for name in ("images", "annotations"):
        rows = content.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{name} of {path} must be a list of objects, as in COCO's annotations.")
        counts = Counter(str(row["id"]) for row in rows if "id" in row)
        repeated = [key for key, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"{name} of {path} have {len(repeated)} ids more than once ({_show(repeated)}).")
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(content["annotations"]):
        place = f"annotation {number} of {path}"
        if "image_id" not in row:
            raise ValueError(f"{place} has no image_id; COCO's annotations of captions are required.")
        captions.setdefault(_read_id(row, place), []).append(_read_text(row.get("caption"), place, "caption"))
    if not captions:
        raise ValueError(f"{path} has no annotations; references of images are required.")
    return captions


def _read_id(row: dict, place: str) -> str:
    value = next((row[name] for name in _ID_FIELDS if name in row), None)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise ValueError(f"{place} has the image id {value!r}; image_id must be a text or a whole number.")
    return str(value)


def _read_reference_texts(row: dict, place: str) -> list[str]:
    """The references of a line: its `captions`, else its `references`, else its `caption`."""
    name = next((name for name in _REFERENCE_FIELDS if name in row), "caption")
    texts = [row.get(name)] if name == "caption" else row[name]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{place} has {name} {texts!r}; a list of at least one text is required.")
    return [_read_text(text, place, name) for text in texts]


def _read_text(value: object, place: str, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} has {name} {value!r}; a text is required.")
    return value


def _show(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
