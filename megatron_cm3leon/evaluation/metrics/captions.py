"""Captions of a folder of images, and candidate folders 0..N-1 that hold an image of each caption.

CAPTIONS.jsonl             {"image": "000.png", "caption": "a red circle"} per line; folders before the name are ignored
generated.json             what tools/generate.py image writes beside its images
IMAGES/000.png, 000.txt    without a file of captions: a text beside each image
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cm3leon.evaluation.metrics.image_folder import list_images
from megatron_cm3leon.evaluation.text_files import read_objects, read_text


@dataclass(frozen=True)
class CaptionedImage:
    """An image by its name within a folder, and what it should show."""

    name: str
    caption: str


def read_captions(folder: str | Path, captions: str | Path | None) -> tuple[list[CaptionedImage], int]:
    """The captioned images of a folder in the order of the file, and how many images have no caption.

    Raises ValueError if the file of captions cannot be read, or a caption is blank or given twice.
    """
    folder = Path(folder)
    present = {path.name: path for path in list_images(folder, "--images", minimum=1)}
    if captions is None:
        texts = {name: path.with_suffix(".txt") for name, path in present.items()}
        pairs = [CaptionedImage(name, read_text(path).strip()) for name, path in texts.items() if path.is_file()]
        if not pairs:
            raise ValueError(f"--images ({folder}) has no NAME.txt beside its images; give --captions FILE.")
    else:
        pairs = _read_file(Path(captions))
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{captions} has more than one caption of the image {twice}; give one per image.")
    if blank := [pair.name for pair in pairs if not pair.caption.strip()]:
        raise ValueError(f"{len(blank)} captions are blank, such as that of {blank[0]}; remove them or write them.")
    return pairs, len(set(present) - set(names))


def _read_file(path: Path) -> list[CaptionedImage]:
    if not path.is_file():
        raise ValueError(f"--captions ({path}) is not a file; give JSON Lines with image and caption.")
    if path.suffix == ".json":
        try:
            entries = json.loads(read_text(path))["made"]
            return [CaptionedImage(Path(entry["picture"]).name, entry["caption"]) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a generated.json of tools/generate.py image: {error!r}.") from error
    pairs = []
    for number, line in read_objects(path):
        for key in ("image", "caption"):
            if not isinstance(line.get(key), str):
                raise ValueError(
                    f"{path}:{number}: {key} ({line.get(key)!r}) must be a text; give image and caption in each line."
                )
        pairs.append(CaptionedImage(Path(line["image"]).name, line["caption"]))
    if not pairs:
        raise ValueError(f"--captions ({path}) has no captions; give JSON Lines with image and caption.")
    return pairs


def check_candidates(folders: Sequence[Path], pairs: Sequence[CaptionedImage]) -> None:
    """Raise ValueError if a captioned image is missing in one of the folders."""
    for folder in folders:
        if missing := [pair.name for pair in pairs if not (folder / pair.name).is_file()]:
            raise ValueError(
                f"{len(missing)} of {len(pairs)} captions have no image in {folder}, such as {missing[0]}; "
                f"generate them, or remove their captions."
            )
