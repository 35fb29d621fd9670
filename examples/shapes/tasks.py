"""Write tasks of instruction tuning on colored shapes: questions, edits, boxes, conditions, captions, images.

    python examples/shapes/tasks.py --output shapes-tasks/ --train 6000 --heldout 1000 --size 32 --seed 0

    shapes-tasks/TASK-train.jsonl      one record per line, images as paths
    shapes-tasks/TASK-heldout.jsonl    the same of attribute combinations that do not occur in training
    shapes-tasks/TASK-shuffled.jsonl   the held-out records with each other's instructions: accuracy must fall to chance
    shapes-tasks/TASK.png              a contact sheet of held-out records
    shapes-tasks/images/               the images of all tasks

    task                      fields of a record
    caption                   image, caption
    text_to_image             caption, image
    vqa                       image, question, answer
    edit                      image, instruction, edited
    ground                    caption, objects, width, height, image    objects: [{"name", "box"}], boxes in pixels
    control_canny,            condition, caption, image             the caption has no places and sizes, the condition
    control_scribble,                                               has no colors
    control_segmentation
    infill_text               image, caption, blanked, missing      blanked: the caption with ___ for one word
    infill_box                caption, image, regions, blanked, box     blanked: the regions with ___ for one box

Every record also has `id`, `kind` (of question, edit, number of objects), `phrasing` (train or heldout) and `scene`
(objects, jitter): what task_checker.py needs. The names of tasks and fields are those of the templates of the same
tasks. `objects` has boxes [left, top, right, bottom] in pixels, right and bottom exclusive; `regions` is the text "red
circle at 03 03 37 37, ...", where 00 is the left or top edge of the image and 99 the right or bottom one.

Combinations are held out as in generate.py with the same seed, so a base model of its corpus has not seen them. Every
second held-out record has a phrasing that no training record has; captions to be written and infilled have none.
"""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for running this file as a script

from examples.shapes import edits, questions
from examples.shapes.drawing import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    EXTENTS,
    IMAGE_SIZES,
    PHRASINGS,
    SHAPES,
    draw_mask,
)
from examples.shapes.generate import split_combinations
from examples.shapes.scenes import MOST_OBJECTS, SCENE_PHRASINGS, Scene, choose_scenes, draw_scene, write_scene_caption
from megatron_cm3leon.common.atomic_io import atomic_directory, write_json
from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.common.contact_sheet import draw_contact_sheet
from megatron_cm3leon.common.progress import track
from megatron_cm3leon.data.tasks.conditions import color_labels, get_condition

Record = dict
Jitter = tuple[int, int]
BLANK = "___"
BOX_STEPS = 99
"""Number of the right and the bottom edge of the image in a box that is written as text."""
SHEET = 30
"""Records on a contact sheet."""
INSTRUCTIONS = {
    "text_to_image": ("caption",),
    "vqa": ("question",),
    "edit": ("instruction",),
    "ground": ("caption", "objects"),
    "control_canny": ("caption", "condition"),
    "control_scribble": ("caption", "condition"),
    "control_segmentation": ("caption", "condition"),
}
"""Task -> fields that TASK-shuffled.jsonl exchanges among records."""

_HELDOUT_CAPTIONS = (
    "{background} background, {objects}",
    "on a {background} background there is {objects}",
)
_PLAIN_CAPTIONS = ("{objects} on a {background} background", "on {background}, {objects}",
                   "a {background} background with {objects}")  # fmt: skip
_OBJECT = "a {size} {colour} {shape} {place}"


@dataclass(frozen=True)
class Split:
    """What the records of a split may contain."""

    name: str
    combinations: Scene
    before: frozenset[tuple[str, ...]]
    """Combinations that an object may have before an edit: an image of a held-out edit may show known ones there."""


class Writer:
    """Makes the records of one task and split; images are written once, whatever tasks show them."""

    def __init__(self, output: Path, task: str, split: Split, options: argparse.Namespace) -> None:
        self.output, self.task, self.split, self.size = output, task, split, options.size
        self.seed = _derive_seed(options.seed, task, split.name)
        self.objects = options.objects
        self.random = np.random.default_rng(self.seed)

    def write(self, count: int) -> list[Record]:
        """`count` records."""
        make = _TASKS[self.task]
        records: list[Record] = []
        scenes = self.stream_scenes()
        for number in track(range(count), label=f"{self.task} {self.split.name}", unit="records"):
            heldout = self.split.name == "heldout" and number % 2 == 1 and self.task in INSTRUCTIONS
            made = next(made for scene, jitter in scenes if (made := make(self, scene, jitter, number, heldout)))
            about = {"id": f"{self.task}-{self.split.name}-{number}", "phrasing": "heldout" if heldout else "train"}
            records.append(made | about)
        return records

    def stream_scenes(self) -> Iterator[tuple[Scene, Jitter]]:
        """Scenes without end."""
        for chunk in itertools.count():
            seed = _derive_seed(self.seed, chunk)
            for scene, jitter, _ in choose_scenes(self.split.combinations, 300, self.objects, seed):
                yield scene, jitter

    def save(self, pixels: np.ndarray) -> str:
        """Write an image, uint8 [size, size, 3], under a name made of its pixels; returns its path."""
        path = Path("images") / f"{hashlib.sha256(pixels.tobytes()).hexdigest()[:20]}.png"
        if not (self.output / path).exists():
            Image.fromarray(pixels).save(self.output / path)
        return str(path)

    def draw(self, scene: Scene, jitter: Jitter) -> str:
        """Write the image of a scene; returns its path."""
        return self.save(draw_scene(scene, jitter, self.size))

    def choose(self, texts: tuple[str, ...]) -> str:
        """One of some texts."""
        return texts[int(self.random.integers(len(texts)))]


def describe(scene: Scene, jitter: Jitter) -> dict:
    """The `scene` of a record."""
    return {"objects": scene, "jitter": list(jitter)}


def find_box(attributes: dict[str, str], jitter: Jitter, image_size: int) -> list[int]:
    """Bounding box of an object: [left, top, right, bottom] in pixels, right and bottom exclusive."""
    mask = draw_mask(attributes["shape"], attributes["size"], attributes["position"], jitter, image_size)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def write_plain_caption(scene: Scene, template: str) -> str:
    """A caption with the colors and shapes of the objects, without places and sizes."""
    return template.format(
        objects=_join([_add_article(f"{entry['colour']} {entry['shape']}") for entry in scene]),
        background=scene[0]["background"],
    )


def list_boxes(scene: Scene, jitter: Jitter, image_size: int) -> list[dict]:
    """The objects with their boxes: [{"name": "red circle", "box": [left, top, right, bottom]}], in pixels."""
    return [
        {"name": f"{entry['colour']} {entry['shape']}", "box": find_box(entry, jitter, image_size)} for entry in scene
    ]


def write_box(box: list[int], image_size: int) -> str:
    """A box as text: four numbers of two digits, from 00 to BOX_STEPS."""
    return " ".join(f"{round(BOX_STEPS * edge / image_size):02d}" for edge in box)


def draw_classes(scene: Scene, jitter: Jitter, image_size: int) -> np.ndarray:
    """The exact segmentation map: each shape has the color of its class, the background is black."""
    labels = np.zeros((image_size, image_size), np.int64)
    for entry in scene:
        mask = draw_mask(entry["shape"], entry["size"], entry["position"], jitter, image_size)
        labels[mask] = 1 + SHAPES.index(entry["shape"])
    return np.asarray(color_labels(labels))


def _make_caption(writer: Writer, scene: Scene, jitter: Jitter, number: int, heldout: bool) -> Record:
    if heldout:
        phrases = [_OBJECT.format(**entry, place=_place(entry)) for entry in scene]
        caption = writer.choose(_HELDOUT_CAPTIONS).format(objects=_join(phrases), background=scene[0]["background"])
    else:
        phrasings = PHRASINGS if len(scene) == 1 else len(SCENE_PHRASINGS)
        caption = write_scene_caption(scene, int(writer.random.integers(phrasings)))
    return {
        "image": writer.draw(scene, jitter),
        "caption": caption,
        "kind": _count_objects(scene),
        "scene": describe(scene, jitter),
    }


def _make_question(writer: Writer, scene: Scene, jitter: Jitter, number: int, heldout: bool) -> Record | None:
    kinds = list(questions.KINDS)
    kind = kinds[number // 2 % len(kinds)]  # pairs of records: held-out records alternate between phrasings
    yes = number // 2 // len(kinds) % 2 == 0
    asked = questions.ask_question(scene, kind, yes, heldout, writer.random)
    if asked is None:
        return None
    return {
        "image": writer.draw(scene, jitter),
        "question": asked.text,
        "answer": asked.answer,
        "kind": kind,
        "scene": describe(scene, jitter),
    }


def _make_edit(writer: Writer, scene: Scene, jitter: Jitter, number: int, heldout: bool) -> Record | None:
    kinds = list(edits.KINDS)
    edit = edits.choose_edit(scene, kinds[number // 2 % len(kinds)], writer.split.before, heldout, writer.random)
    if edit is None:
        return None
    return {
        "image": writer.draw(edit.before, jitter),
        "instruction": edit.instruction,
        "edited": writer.draw(edit.after, jitter),
        "kind": edit.kind,
        "index": edit.index,
        "scene_before": describe(edit.before, jitter),
        "scene": describe(edit.after, jitter),
    }


def _make_ground(writer: Writer, scene: Scene, jitter: Jitter, number: int, heldout: bool) -> Record:
    templates = _HELDOUT_CAPTIONS if heldout else _PLAIN_CAPTIONS
    return {
        "caption": write_plain_caption(scene, writer.choose(templates)),
        "objects": list_boxes(scene, jitter, writer.size),
        "width": writer.size,
        "height": writer.size,
        "image": writer.draw(scene, jitter),
        "kind": _count_objects(scene),
        "scene": describe(scene, jitter),
    }


def _make_control(writer: Writer, scene: Scene, jitter: Jitter, number: int, heldout: bool) -> Record | None:
    if len({entry["shape"] for entry in scene}) < len(scene):
        return None  # the caption would not say which of two equal shapes has which color
    pixels = draw_scene(scene, jitter, writer.size)
    name = writer.task.removeprefix("control_")
    if name == "segmentation":
        condition = draw_classes(scene, jitter, writer.size)
    else:
        condition = np.asarray(get_condition(name)(Image.fromarray(pixels)))
    return {
        "condition": writer.save(condition),
        "caption": write_plain_caption(scene, writer.choose(_HELDOUT_CAPTIONS if heldout else _PLAIN_CAPTIONS)),
        "image": writer.save(pixels),
        "kind": _count_objects(scene),
        "scene": describe(scene, jitter),
    }


def _make_blanked_text(writer: Writer, scene: Scene, jitter: Jitter, number: int, heldout: bool) -> Record:
    record = _make_caption(writer, scene, jitter, number, heldout)
    words = record["caption"].split(" ")
    index, name = _choose_word(words, writer.random)
    ending = "," if words[index].endswith(",") else ""
    missing = words[index].removesuffix(ending) if ending else words[index]
    blanked = " ".join([*words[:index], BLANK + ending, *words[index + 1 :]])
    return record | {"blanked": blanked, "missing": missing, "kind": name}


def _choose_word(words: list[str], random: np.random.Generator) -> tuple[int, str]:
    """Index of a word that names a color, shape, size or background, and which of these."""
    kinds = {"colour": COLORS, "shape": SHAPES, "size": EXTENTS, "background": BACKGROUNDS}
    found = [
        (index, name)
        for name, values in kinds.items()
        for index, word in enumerate(words)
        if word.removesuffix(",") in values
    ]
    names = sorted({name for _, name in found})
    name = names[int(random.integers(len(names)))]
    indices = [index for index, other in found if other == name]
    return indices[int(random.integers(len(indices)))], name


def _make_blanked_box(writer: Writer, scene: Scene, jitter: Jitter, number: int, heldout: bool) -> Record | None:
    record = _make_ground(writer, scene, jitter, number, heldout)
    names = [each["name"] for each in record["objects"]]
    if len(set(names)) < len(names):
        return None  # the box of which of two equal objects?
    index = int(writer.random.integers(len(names)))
    boxes = [write_box(each["box"], writer.size) for each in record["objects"]]
    blanked = [BLANK if other == index else box for other, box in enumerate(boxes)]
    regions, blanked_regions = (
        ", ".join(f"{name} at {box}" for name, box in zip(names, shown, strict=True)) for shown in (boxes, blanked)
    )
    return record | {"regions": regions, "blanked": blanked_regions, "box": boxes[index]}


_TASKS: dict[str, Callable[[Writer, Scene, Jitter, int, bool], Record | None]] = {
    "caption": _make_caption,
    "text_to_image": _make_caption,
    "vqa": _make_question,
    "edit": _make_edit,
    "ground": _make_ground,
    "control_canny": _make_control,
    "control_scribble": _make_control,
    "control_segmentation": _make_control,
    "infill_text": _make_blanked_text,
    "infill_box": _make_blanked_box,
}
TASKS = tuple(_TASKS)


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _add_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _place(entry: dict[str, str]) -> str:
    return "in the centre" if entry["position"] == "centre" else f"in the {entry['position']} corner"


def _count_objects(scene: Scene) -> str:
    return f"{len(scene)} object{'s' if len(scene) > 1 else ''}"


def _derive_seed(*keys: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:6], "big")


def shuffle_instructions(records: list[Record], task: str, seed: int) -> list[Record]:
    """The records with the instructions of others: no record keeps its own, unless two are equal by chance."""
    order = np.random.default_rng(_derive_seed(seed, task)).permutation(len(records))
    shuffled = [dict(record) for record in records]
    for place, other in zip(order, np.roll(order, 1), strict=True):
        shuffled[place] |= {name: records[other][name] for name in INSTRUCTIONS[task]}
    return shuffled


def draw_sheet(output: Path, task: str, records: list[Record]) -> Image.Image:
    """A contact sheet of some records: their images, with what is asked and expected below."""
    images, captions = [], []
    for record in records[:SHEET]:
        names = [name for name in ("condition", "image", "edited") if name in record]
        asked = [f"{name}: {record[name]}" for name in _SHOWN if name in record]
        for position, name in enumerate(names):
            with Image.open(output / record[name]) as image:
                images.append(image.convert("RGB"))
            captions.append("; ".join(asked) if position == 0 else name)
    return draw_contact_sheet(images, captions, 10)


_SHOWN = ("question", "answer", "instruction", "blanked", "missing", "box", "caption")


def split_scenes(seed: int) -> dict[str, Split]:
    """The splits by name."""
    train, heldout = split_combinations(seed)
    keys = {
        name: frozenset(tuple(entry[attribute] for attribute in ATTRIBUTES) for entry in entries)
        for name, entries in (("train", train), ("heldout", heldout))
    }
    return {
        "train": Split("train", train, keys["train"]),
        "heldout": Split("heldout", heldout, keys["train"] | keys["heldout"]),
    }


def write_lines(path: Path, records: list[Record]) -> None:
    """Write a JSON Lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_tasks(output: Path, options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Write every task; returns the numbers of records by task and split. Nothing is written if it is interrupted."""
    if output.exists():
        raise ValueError(f"--output {output} exists; give another folder, or remove it first.")
    counts: dict[str, dict[str, int]] = {}
    splits = split_scenes(options.seed)
    with atomic_directory(output) as folder:
        (folder / "images").mkdir()
        for task in options.tasks:
            counts[task] = {}
            for name, split in splits.items():
                records = Writer(folder, task, split, options).write(getattr(options, name))
                write_lines(folder / f"{task}-{name}.jsonl", records)
                counts[task][name] = len(records)
            if task in INSTRUCTIONS:
                write_lines(folder / f"{task}-shuffled.jsonl", shuffle_instructions(records, task, options.seed))
            draw_sheet(folder, task, records).save(folder / f"{task}.png")
        write_json(folder / "tasks.json", {"size": options.size, "seed": options.seed, "records": counts})
    return counts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write tasks of instruction tuning on colored shapes.", formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--output", type=user_path, required=True, help="folder to write")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    add("--train", type=int, default=6000, help="training records per task")
    add("--heldout", type=int, default=1000, help="held-out records per task")
    add("--size", type=int, default=32, choices=IMAGE_SIZES, help="image size in pixels")
    add("--objects", type=int, default=3, choices=range(1, MOST_OBJECTS + 1), help="most objects in an image")
    add("--seed", type=int, default=0, help="seed of everything; the split is that of generate.py with this seed")
    options = parser.parse_args()
    for name in ("train", "heldout"):
        if getattr(options, name) < 2:
            raise ValueError(f"--{name} ({getattr(options, name)}) must be at least 2.")
    return options


def main() -> None:
    options = parse_arguments()
    counts = write_tasks(Path(options.output), options)
    for task, of_task in counts.items():
        print(f"{task:<14} {of_task['train']} training and {of_task['heldout']} held-out records")
    print(f"wrote {options.output}; look at TASK.png there")


if __name__ == "__main__":
    run_tool(main)
