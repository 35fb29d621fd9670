"""The condition images of a corpus: pairs in, the same pairs with a condition image each out.

tools/make_conditions.py is the command. It writes:

    DIR/conditions.jsonl     one {"image", "condition", "caption", ...} per usable pair, in the order of the input
    DIR/CONDITION/PART/KEY.png   the condition images
    DIR/images/PART/KEY.png  the images, where they are resized or were inside the input
    DIR/quarantine.jsonl     {"key", "source", "reason"} of each input that is not used
    DIR/manifest.json        what was asked for, and counts
    DIR/sheet.png            the first images beside their conditions

A part of the input is written by one process. Its lines have a file in DIR/parts until all parts are complete, so that
an interrupted run continues with the parts that are missing, and writes the same files.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.common.contact_sheet import draw_contact_sheet
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.data.preprocess.document_reader import read_image
from megatron_cm3leon.data.sources import BadInput, Entry, Fields, RawDocument, RawImage, RawPair, Source, open_source
from megatron_cm3leon.data.sources.files import is_url, read_file, resolve_name
from megatron_cm3leon.data.tasks.conditions import (
    MAPS,
    WEIGHTS,
    Function,
    check_same_size,
    draw_map,
    get_condition,
    list_conditions,
    read_map,
)

RECORDS, QUARANTINE, MANIFEST, SHEET, PARTS = (
    "conditions.jsonl", "quarantine.jsonl", "manifest.json", "sheet.png", "parts",
)  # fmt: skip
PART_SIZE = 256
"""Inputs per part."""
FORMAT = 1


@dataclass(frozen=True)
class ConditionSettings:
    """What the condition images depend on, beside the input."""

    condition: str
    """Name of the condition (data/tasks/conditions.py)."""
    size: int = 0
    """Height and width to which an image is cropped and resized first, pixels; 0 keeps the image."""
    map_field: str = ""
    """Field of the records with the path of a map that the condition is drawn from; "": it is computed."""
    invert: bool = False
    """Whether the maps are of distances, whose near values are the small ones."""
    weights: str = WEIGHTS
    """Repository or folder with the weights of a detector."""


@dataclass(frozen=True)
class ConditionCounts:
    """How many inputs were used."""

    written: int
    quarantined: int


def make_conditions(
    inputs: list[str],
    output: str | Path,
    settings: ConditionSettings,
    form: str = "auto",
    fields: Fields = Fields(),  # noqa: B008
    workers: int = 1,
    max_bad_fraction: float = 0.01,
    sheet: int = 24,
) -> ConditionCounts:
    """Write the condition images of a corpus; continues an interrupted run with the same input and settings.

    `sheet`: pairs on the contact sheet. ValueError if the settings do not fit each other or the run that `output`
    holds, if no input is usable, and if more than `max_bad_fraction` of them are not.
    """
    check_settings(settings)
    source = open_source(inputs, PART_SIZE, form, fields)
    folder = Path(output)
    manifest = {"format": FORMAT, "input": source.identity, **asdict(settings)}
    finished = _open_output(folder, manifest)
    if finished is not None:
        return finished
    missing = [part for part in range(source.parts) if not _part_path(folder, part).exists()]
    bad = sum(map(len, (_read_part(folder, part)[1] for part in range(source.parts) if part not in set(missing))))
    with meter(source.count, settings.condition, "inputs") as progress:
        progress.advance(sum(source.part_inputs(part) or 0 for part in set(range(source.parts)) - set(missing)))
        for part in _write_parts(source, missing, folder, settings, workers):
            progress.advance(source.part_inputs(part) or 0)
            bad += len(_read_part(folder, part)[1])
            if source.count and bad > max_bad_fraction * source.count:
                raise _explain_bad(folder, source.parts, bad, max_bad_fraction)
    return _finish(folder, source.parts, manifest, max_bad_fraction, sheet)


def check_settings(settings: ConditionSettings) -> None:
    """ValueError for a condition that does not exist or cannot be made this way, and for a size below 1."""
    if settings.condition not in list_conditions():
        raise ValueError(
            f"--condition ({settings.condition}) does not exist; give one of: {', '.join(list_conditions())}."
        )
    if settings.size < 0:
        raise ValueError(f"--size ({settings.size}) must be at least 0.")
    if settings.map_field and settings.condition not in MAPS:
        raise ValueError(f"--map-field is for {', '.join(MAPS)}, not for --condition {settings.condition}; remove it.")
    if settings.invert and not (settings.map_field and settings.condition == "depth"):
        raise ValueError("--invert-map is for --condition depth with --map-field; remove it.")
    if not settings.map_field:
        get_condition(settings.condition, settings.weights)  # is everything installed?


def _open_output(folder: Path, manifest: dict) -> ConditionCounts | None:
    """Prepare `folder`; the counts if it is complete. ValueError if it holds something else."""
    path = folder / MANIFEST
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in manifest.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{folder} holds condition images made with {name}={before.get(name)}, not {value}; give another "
                    f"--output, or remove it."
                )
        return ConditionCounts(before["written"], before["quarantined"]) if before["complete"] else None
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {MANIFEST}; give another --output.")
    (folder / PARTS).mkdir(parents=True)
    write_json(path, manifest | {"complete": False})
    return None


def _part_path(folder: Path, part: int) -> Path:
    return folder / PARTS / f"{part:05d}.json"


def _read_part(folder: Path, part: int) -> tuple[list[dict], list[dict]]:
    content = json.loads(_part_path(folder, part).read_text())
    return content["records"], content["quarantine"]


def _write_parts(
    source: Source, parts: list[int], folder: Path, settings: ConditionSettings, workers: int
) -> Iterator[int]:
    """Yields the number of each part when it is complete."""
    if workers == 1 or len(parts) < 2:
        for part in parts:
            write_part(source, part, folder, settings)
            yield part
        return
    # spawn: the bar of the progress has a thread, which a fork would not copy.
    with ProcessPoolExecutor(min(workers, len(parts)), multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(write_part, source, part, folder, settings): part for part in parts}
        try:
            for future in as_completed(running):
                future.result()
                yield running[future]
        finally:  # after Ctrl-C, wait for the parts that are being written, not for all
            pool.shutdown(cancel_futures=True)


def write_part(source: Source, part: int, folder: Path, settings: ConditionSettings) -> None:
    """Write the images of one part, and then the file with its records."""
    writer = PartWriter(folder, part, settings)
    records, quarantine = [], []
    for entry in source.read_part(part):
        result = writer.write(entry, source)
        if isinstance(result, BadInput):
            quarantine.append(result.to_dict())
        else:
            records.append(result)
    write_json(_part_path(folder, part), {"records": records, "quarantine": quarantine})


class PartWriter:
    """Writes the images of one part."""

    def __init__(self, folder: Path, part: int, settings: ConditionSettings) -> None:
        self.folder, self.part, self.settings = folder, part, settings
        self.compute: Function | None = None
        if not settings.map_field:
            self.compute = get_condition(settings.condition, settings.weights)

    def write(self, entry: Entry, source: Source) -> dict | BadInput:
        """Write the condition image of an input; its record, or why it is not usable."""
        if isinstance(entry, BadInput):
            return entry
        if not isinstance(entry, RawPair):
            key, name = (entry.key, entry.source) if isinstance(entry, RawDocument) else ("", "")
            return BadInput(key, name, "not a pair of an image and a caption")
        try:
            image = read_image(entry.images[0])[0]
            extra = json.loads(entry.extra)
            if self.compute:
                image = self._crop(image)
                condition = self.compute(image)
            else:
                method = Image.Resampling.NEAREST if self.settings.condition == "segmentation" else None
                condition = self._crop(self._draw_map(extra, image, entry, source), method)
                image = self._crop(image)
        except ValueError as error:
            return BadInput(entry.key, entry.source, str(error))
        written = self._save(self.settings.condition, entry.key, condition)
        shown = self._save("images", entry.key, image) if self._must_copy(entry.images[0]) else self._refer(entry)
        return {**extra, "image": shown, "condition": written, "caption": entry.caption}

    def _draw_map(self, extra: dict, image: Image.Image, entry: RawPair, source: Source) -> Image.Image:
        field = self.settings.map_field
        name = extra.get(field)
        if not isinstance(name, str) or not name:
            raise ValueError(f'field "{field}" is missing, which --map-field names')
        listed = entry.source.rpartition(":")[0] or entry.source
        path = resolve_name(os.path.dirname(resolve_name(source.folder, listed)), name)
        try:
            content = read_file(path)
        except OSError as error:
            raise ValueError(f"missing map: {name}: {error.strerror or error}") from error
        values = read_map(content, name)
        check_same_size(values, image, self.settings.condition)
        return draw_map(self.settings.condition, values, self.settings.invert)

    def _crop(self, image: Image.Image, method: Image.Resampling | None = None) -> Image.Image:
        return crop_image(image, self.settings.size, method) if self.settings.size else image

    def _must_copy(self, image: RawImage) -> bool:
        return bool(self.settings.size) or image.content is not None

    def _refer(self, entry: RawPair) -> str:
        """Path of the input's image, from the folder of the output."""
        path = entry.images[0].path
        return path if is_url(path) else os.path.relpath(path, self.folder.resolve())

    def _save(self, kind: str, key: str, image: Image.Image) -> str:
        name = f"{kind}/{self.part:05d}/{key}.png"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return name


def crop_image(image: Image.Image, size: int, method: Image.Resampling | None = None) -> Image.Image:
    """The largest centered square of an image, resized: what the image tokenizer reads (fit=crop)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), method or Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _explain_bad(folder: Path, parts: int, bad: int, allowed: float) -> ValueError:
    """The error; the parts with these inputs are written again by the next run, which may find them fixed."""
    known = [part for part in range(parts) if _part_path(folder, part).exists()]
    lines = []
    for part in known:
        if quarantine := _read_part(folder, part)[1]:
            lines += quarantine
            _part_path(folder, part).unlink()
    _write_lines(folder / QUARANTINE, lines)
    return ValueError(
        f"{bad} inputs are not usable, more than --max-bad-fraction {allowed:g} allows, the first because of: "
        f"{lines[0]['reason']}. {folder / QUARANTINE} lists them; fix them, or raise --max-bad-fraction, and run the "
        f"same command again."
    )


def _write_lines(path: Path, lines: list[dict]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def _finish(folder: Path, parts: int, manifest: dict, allowed: float, sheet: int) -> ConditionCounts:
    """Join the parts, draw the contact sheet, and mark the folder as complete."""
    records, quarantine = [], []
    for part in range(parts):
        of_part, bad = _read_part(folder, part)
        records += of_part
        quarantine += bad
    if quarantine and len(quarantine) > allowed * (len(records) + len(quarantine)):
        raise _explain_bad(folder, parts, len(quarantine), allowed)
    if not records:
        raise ValueError(f"{folder}: the input holds no pair of an image and a caption.")
    _write_lines(folder / RECORDS, records)
    _write_lines(folder / QUARANTINE, quarantine)
    draw_sheet(folder, records[:sheet]).save(folder / SHEET)
    counts = ConditionCounts(len(records), len(quarantine))
    write_json(folder / MANIFEST, manifest | asdict(counts) | {"complete": True})
    shutil.rmtree(folder / PARTS)
    return counts


def draw_sheet(folder: Path, records: list[dict]) -> Image.Image:
    """A contact sheet of some records: each image, with its caption, left of its condition."""
    images, captions = [], []
    for record in records:
        for name, text in (("image", record["caption"]), ("condition", "")):
            path = record[name] if is_url(record[name]) else str(folder / record[name])
            images.append(read_image(RawImage(record[name], path))[0])
            captions.append(text)
    return draw_contact_sheet(images, captions, 8)
