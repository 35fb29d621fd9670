"""Results of tools/generate.py: images, a contact sheet and generated.json, in a folder that appears when complete.

generated.json holds `format` (1), `sampler` (see sampling.py; a file without it is of inverse-1), the `options` of the
command, and `made`, one entry per result.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from megatron_cm3leon.common.atomic_directory import written_whole
from megatron_cm3leon.common.contact_sheet import draw_contact_sheet
from megatron_cm3leon.generation.types import GeneratedImage

RESULTS_FILE = "generated.json"
CONTACT_SHEET = "contact_sheet.png"


def check_output(output: str | Path) -> Path:
    """The path; ValueError if it exists and is not an empty folder."""
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        fault = (
            f"holds the results of an earlier call ({RESULTS_FILE})" if (folder / RESULTS_FILE).exists() else "exists"
        )
        raise ValueError(f"{folder} {fault}; give another --output.")
    return folder


class Results:
    """Results in the order they are generated."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` is where images are written; None for texts that are not written."""
        self.folder = folder
        self.entries: list[dict] = []
        """What generated.json has as `made`."""
        self.shown: list[tuple[Image.Image, str]] = []
        """Images of the contact sheet, with their captions."""

    def save_image(self, image: Image.Image, caption: str) -> str:
        """Write an image; return the name of its file."""
        assert self.folder is not None, "images need a folder"
        name = f"{len(self.shown):03d}.png"
        image.save(self.folder / name)
        self.shown.append((image, caption))
        return name

    def save_generated(self, made: GeneratedImage, caption: str) -> dict:
        """Write a generated image, with this caption on the contact sheet; return its entry of generated.json."""
        name = self.save_image(made.image, caption)
        entry = {"picture": name, "caption": made.caption, "seed": made.seed, "codes": made.codes.tolist()}
        return entry if made.score is None else entry | {"score": made.score}


@contextmanager
def written_results(output: str | Path | None, options: dict) -> Iterator[Results]:
    """Collect results in a temporary folder beside `output`, renamed on success and removed on any error.

    `options` are those of the command, with its `sampler`. Nothing is written if `output` is None.
    """
    if output is None:
        yield Results(None)
        return
    with written_whole(Path(output)) as folder:
        results = Results(folder)
        yield results
        if results.shown:
            images, captions = map(list, zip(*results.shown, strict=True))
            draw_contact_sheet(images, captions).save(folder / CONTACT_SHEET)
        content = {"format": 1, "sampler": options["sampler"], "options": options, "made": results.entries}
        (folder / RESULTS_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
