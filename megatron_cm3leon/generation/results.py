"""What a call of tools/generate.py writes, whole or not at all: pictures, a contact sheet and generated.json.

generated.json holds `format` (1), `sampler` (see sampling.py; a file without it is of inverse-1), `options` of the
command and `made`, one entry per result.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from megatron_cm3leon.common.atomic_directory import written_whole
from megatron_cm3leon.common.contact_sheet import draw_contact_sheet

ACCOUNT = "generated.json"


def check_output(output: str | Path) -> Path:
    """ValueError for a name that is taken."""
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        held = (
            f"holds the results of an earlier call ({ACCOUNT})" if (folder / ACCOUNT).exists() else "is there already"
        )
        raise ValueError(f"{folder} {held}; give another --output.")
    return folder


class Results:
    """Collects what is made, in the order it is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[dict] = []
        self.shown: list[tuple[Image.Image, str]] = []

    def save(self, picture: Image.Image, caption: str) -> str:
        """Write a picture; its file's name."""
        name = f"{len(self.shown):03d}.png"
        picture.save(self.folder / name)
        self.shown.append((picture, caption))
        return name


@contextmanager
def written_results(output: Path, options: dict) -> Iterator[Results]:
    """Results under a temporary name beside `output`, renamed when all is there and removed on any error.

    `options` has the command's `sampler`.
    """
    with written_whole(output) as folder:
        results = Results(folder)
        yield results
        if results.shown:
            draw_contact_sheet(*map(list, zip(*results.shown, strict=True))).save(folder / "contact_sheet.png")
        account = {"format": 1, "sampler": options["sampler"], "options": options, "made": results.made}
        (folder / ACCOUNT).write_text(json.dumps(account, indent=2, ensure_ascii=False) + "\n")
