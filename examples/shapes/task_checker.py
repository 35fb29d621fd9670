"""Whether an answer or a generated image is right, for the tasks that tasks.py writes.

    python examples/shapes/task_checker.py --task edit --records tasks/edit-heldout.jsonl --results results.jsonl
    python examples/shapes/task_checker.py --task edit --records tasks/edit-heldout.jsonl --ceiling tokenizer/
    python examples/shapes/task_checker.py --task vqa --records tasks/vqa-heldout.jsonl --chance tasks/vqa-train.jsonl

A result is {"id", "text"} or {"id", "image"} (a path relative to the file of results). Printed are the shares of right
results: of all, per kind and per phrasing. The ceiling is the share of right ones among the true images after they went
through an image tokenizer: more is not to be expected of a model that draws with it.

    caption, vqa, infill_text, infill_box    the text, exact after normalization; a caption names the right objects
    text_to_image       the right objects on the right background, and nothing else
    edit                `changed`: the object is as instructed; `unchanged`: everything else is where and what it was
    ground              every object overlaps its box (IoU at least 0.7) with the right color and shape; nothing else
    control_canny, control_scribble, control_segmentation
                        the right objects, with the places and sizes of the condition; nothing else
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for running this file as a script

from examples.shapes import geneval, scene_checker
from examples.shapes.checker import to_array
from examples.shapes.drawing import BACKGROUNDS, COLORS, POSITIONS, draw_mask
from examples.shapes.scenes import Scene, draw_scene
from examples.shapes.tasks import TASKS, Record
from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.common.jsonl import parse_lines
from megatron_cm3leon.common.progress import track
from megatron_cm3leon.evaluation.metrics.vqa_answers import normalize_answer
from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.images import from_pixels, load_image, to_pixels

Verdict = dict[str, bool]
"""Name of a requirement -> whether it holds; `right`: all of them."""

OVERLAP = 0.7
"""Intersection over union of a box that counts as found."""
STRAY_DISTANCE = 96
"""Difference in a channel, in levels of 0..255, from which a pixel shows something else."""
STRAY_SHARE = 0.01
"""Share of all pixels that may show something else."""
MOST_SHIFT = 2
"""Shifts of an object that are compared, in pixels of a 32-pixel image."""
_SPELLINGS = {"center": "centre", "gray": "grey"}


def normalize_text(text: str) -> str:
    """An answer as VQA's official script normalizes it, without capitals, with the corpus' spelling."""
    words = normalize_answer(text.lower()).split()
    return " ".join(_SPELLINGS.get(word, word) for word in words)


def match_text(text: str, expected: str) -> Verdict:
    """Exact match after normalization."""
    return {"right": normalize_text(text) == normalize_text(expected)}


def match_box(text: str, expected: str) -> Verdict:
    """Whether a text is a box "left top right bottom" that overlaps the expected one."""
    found, true = _parse_box(text), _parse_box(expected)
    assert true is not None, f"a record with a wrong box: {expected!r}"
    return {"right": found is not None and measure_overlap(found, true) >= OVERLAP}


def _parse_box(text: str) -> tuple[float, ...] | None:
    words = text.strip().rstrip(".").split()
    return tuple(map(float, words)) if len(words) == 4 and all(word.isdecimal() for word in words) else None


def match_caption(text: str, scene: Scene) -> Verdict:
    """Whether a caption names the objects of the scene, with all attributes, and the background."""
    return {"right": scene_checker.parse_caption(text.strip().rstrip(".")) == scene_checker.describe_scene(scene)}


def measure_overlap(one: Iterable[float], other: Iterable[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    left, top, right, bottom = one
    left_2, top_2, right_2, bottom_2 = other
    shared = max(0.0, min(right, right_2) - max(left, left_2)) * max(0.0, min(bottom, bottom_2) - max(top, top_2))
    total = max(0.0, right - left) * max(0.0, bottom - top) + (right_2 - left_2) * (bottom_2 - top_2) - shared
    return shared / total if total > 0 else 0.0


def find_shift(pixels: np.ndarray, attributes: dict[str, str]) -> tuple[int, int]:
    """Shift (rows, columns) from the center of its position at which an object fits best.

    pixels: float32 [size, size, 3] in 0..255. Only the surroundings of the position are compared.
    """
    color, background = (
        np.array(table[attributes[name]], np.float32)
        for table, name in ((COLORS, "colour"), (BACKGROUNDS, "background"))
    )
    shifts, masks = _load_shifted(attributes["shape"], attributes["size"], attributes["position"], len(pixels))
    # What the squared error gains where the object covers the background.
    gain = ((pixels - color) ** 2 - (pixels - background) ** 2).sum(axis=2)
    return shifts[int((masks @ gain.ravel()).argmin())]


@cache
def _load_shifted(shape: str, size: str, position: str, image_size: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Shifts of an object, the small ones first, and its mask at each, float32 [shifts, pixels], without what is
    outside the quarter of the image around a corner: other objects may be there."""
    most = MOST_SHIFT * image_size // 32
    shifts = sorted(product(range(-most, most + 1), repeat=2), key=lambda shift: abs(shift[0]) + abs(shift[1]))
    around = _surround(position, image_size)
    masks = [draw_mask(shape, size, position, shift, image_size) & around for shift in shifts]
    return shifts, np.stack(masks).reshape(len(masks), -1).astype(np.float32)


def _surround(position: str, size: int) -> np.ndarray:
    """The quarter of the image around a corner, or all of it around the centre, booleans [size, size]."""
    around = np.zeros((size, size), bool)
    rows, columns = (
        slice(None) if 2 * center == 32 else slice(size // 2) if 2 * center < 32 else slice(size // 2, None)
        for center in POSITIONS[position]
    )
    around[rows, columns] = True
    return around


def count_stray(pixels: np.ndarray, expected: np.ndarray) -> float:
    """Share of pixels that show something else than the expected image, apart from its edges, which may be blurred."""
    reach = max(1, len(pixels) // 32)
    inner = np.ones(pixels.shape[:2], bool)
    for down, right in product(range(-reach, reach + 1), repeat=2):
        rows, columns = (np.clip(np.arange(len(pixels)) + step, 0, len(pixels) - 1) for step in (down, right))
        inner &= (expected[rows][:, columns] == expected).all(axis=2)
    wrong = (abs(pixels - expected.astype(np.float32)) >= STRAY_DISTANCE).any(axis=2)
    return float((wrong & inner).mean())


def match_scene(image, scene: Scene) -> Verdict:
    """Whether an image shows the objects of a scene, wherever the jitter has them, and nothing else."""
    pixels = to_array(image)
    verdict = {"objects": scene_checker.classify(image) == scene_checker.describe_scene(scene)}
    verdict["nothing else"] = verdict["objects"] and _shows_nothing_else(pixels, scene)
    return _conclude(verdict)


def match_control(image, scene: Scene, jitter: tuple[int, int]) -> Verdict:
    """`match_scene`, and every object is within a pixel (of 32) of where the condition has it."""
    pixels = to_array(image)
    verdict = match_scene(image, scene)
    near = len(pixels) // 32
    verdict["places"] = verdict["objects"] and all(_is_near(find_shift(pixels, each), jitter, near) for each in scene)
    return _conclude(verdict)


def match_edit(image, before: Scene, after: Scene, index: int, jitter: tuple[int, int]) -> Verdict:
    """Whether object `index` is as in `after`, and everything else as in `before`.

    Other objects must be at the same pixel (at 64 pixels: within one), as must an object that only changes its color.
    """
    pixels = to_array(image)
    found = {_key(entry): entry for entry in scene_checker.find_objects(image)}
    others = [entry for number, entry in enumerate(before) if number != index]
    near = len(pixels) // 64
    changed = _key(after[index]) in found and _key(before[index]) not in found
    same = set(found) - {_key(after[index]), _key(before[index])} == set(map(_key, others))
    recolored = changed and before[index]["colour"] != after[index]["colour"]
    fixed = others + ([after[index]] if recolored else [])
    in_place = all(_is_near(find_shift(pixels, entry), jitter, near) for entry in fixed)
    verdict = {"changed": changed, "unchanged": same and in_place}
    if verdict["changed"] and verdict["unchanged"]:
        verdict["unchanged"] = count_stray(pixels, draw_scene(after, jitter, len(pixels))) <= STRAY_SHARE
    return _conclude(verdict)


def match_ground(image, objects: list[dict], image_size: int) -> Verdict:
    """Whether an image shows an object of the right color and shape in each box, and no other object.

    objects: [{"name": "red circle", "box": [left, top, right, bottom]}], in pixels of an image of `image_size`.
    """
    scale = image_size / len(to_array(image))
    found = geneval.find_objects(image)
    left = list(found)
    overlaps = []
    for each in objects:
        fitting = [
            (measure_overlap([scale * side for side in one["box"]], each["box"]), number)
            for number, one in enumerate(left)
            if f"{one['color']} {one['name']}" == each["name"]
        ]
        overlap, number = max(fitting, default=(0.0, -1))
        overlaps.append(overlap)
        if fitting:
            del left[number]
    return _conclude({"boxes": min(overlaps) >= OVERLAP, "nothing else": len(found) == len(objects)})


def _key(entry: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted(entry.items()))


def _is_near(shift: tuple[int, int], jitter: tuple[int, int], most: int) -> bool:
    return max(abs(shift[0] - jitter[0]), abs(shift[1] - jitter[1])) <= most


def _shows_nothing_else(pixels: np.ndarray, scene: Scene) -> bool:
    shifts = [find_shift(pixels, entry) for entry in scene]
    expected = draw_scene(scene[:1], shifts[0], len(pixels))
    for entry, shift in zip(scene[1:], shifts[1:], strict=True):
        mask = draw_mask(entry["shape"], entry["size"], entry["position"], shift, len(pixels))
        expected[mask] = COLORS[entry["colour"]]
    return count_stray(pixels, expected) <= STRAY_SHARE


def _conclude(verdict: Verdict) -> Verdict:
    return {"right": all(value for name, value in verdict.items() if name != "right")} | {
        name: value for name, value in verdict.items() if name != "right"
    }


_TEXTS: dict[str, Callable[[str, Record], Verdict]] = {
    "caption": lambda text, record: match_caption(text, record["scene"]["objects"]),
    "vqa": lambda text, record: match_text(text, record["answer"]),
    "infill_text": lambda text, record: match_text(text, record["missing"]),
    "infill_box": lambda text, record: match_box(text, record["box"]),
}
_IMAGES: dict[str, Callable[[object, Record, int], Verdict]] = {
    "text_to_image": lambda image, record, size: match_scene(image, record["scene"]["objects"]),
    "edit": lambda image, record, size: match_edit(
        image, record["scene_before"]["objects"], record["scene"]["objects"], record["index"], _jitter(record)
    ),
    "ground": lambda image, record, size: match_ground(image, record["objects"], size),
    **dict.fromkeys(
        ("control_canny", "control_scribble", "control_segmentation"),
        lambda image, record, size: match_control(image, record["scene"]["objects"], _jitter(record)),
    ),
}


def _jitter(record: Record) -> tuple[int, int]:
    down, right = record["scene"]["jitter"]
    return down, right


def judge(task: str, record: Record, result: object, image_size: int = 32) -> Verdict:
    """The verdict on one result: a text, or an image as for checker.classify.

    image_size: size of the records' images, which their boxes refer to.
    """
    if task in _TEXTS:
        if not isinstance(result, str):
            raise ValueError(f"the result for {record['id']} must be a text: the task is {task}.")
        return _TEXTS[task](result, record)
    return _IMAGES[task](result, record, image_size)


def summarize(records: list[Record], verdicts: list[Verdict]) -> dict[str, tuple[float, int]]:
    """(share, number of records) of all records, per requirement, per kind and per phrasing."""
    groups: dict[str, list[bool]] = {}
    for record, verdict in zip(records, verdicts, strict=True):
        groups.setdefault("all", []).append(verdict["right"])
        for name, value in verdict.items():
            if name != "right":
                groups.setdefault(f"requirement: {name}", []).append(value)
        groups.setdefault(f"kind: {record['kind']}", []).append(verdict["right"])
        groups.setdefault(f"phrasing: {record['phrasing']}", []).append(verdict["right"])
    order = sorted(groups, key=lambda name: (name != "all", not name.startswith("requirement"), name))
    return {name: (float(np.mean(groups[name])), len(groups[name])) for name in order}


def measure_chance(train: list[Record], heldout: list[Record]) -> float:
    """Share of held-out questions whose answer is the most frequent one of their kind in training."""
    answers: dict[str, Counter[str]] = {}
    for record in train:
        answers.setdefault(record["kind"], Counter())[record["answer"]] += 1
    best = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}
    return float(np.mean([best.get(record["kind"]) == record["answer"] for record in heldout]))


def read_results(path: Path, records: list[Record], task: str) -> list[object]:
    """The results in the order of the records; ValueError unless each record has one."""
    name = "text" if task in _TEXTS else "image"
    found = {}
    for number, line in enumerate(parse_lines(path), 1):
        if "id" not in line or name not in line:
            raise ValueError(f"{path}:{number} has no {'id' if 'id' not in line else name}, which --task {task} needs.")
        found[line["id"]] = line[name] if name == "text" else path.parent / line[name]
    missing = [record["id"] for record in records if record["id"] not in found]
    if missing:
        raise ValueError(f"{path} has no result for {len(missing)} of {len(records)} records, such as {missing[0]}.")
    return [found[record["id"]] for record in records]


def pass_through(tokenizers: Tokenizers, images: list[Image.Image], batch_size: int = 64) -> list[Image.Image]:
    """Images after encoding and decoding by an image tokenizer."""
    decoded = []
    for start in range(0, len(images), batch_size):
        size = tokenizers.image.image_size
        pixels = torch.stack([to_pixels(image, size) for image in images[start : start + batch_size]])
        decoded += [from_pixels(each) for each in tokenizers.image.decode(tokenizers.image.encode(pixels))]
    return decoded


def judge_file(task: str, records_path: Path, results: list[object] | None, tokenizer: str = "") -> dict:
    """`summarize` of results, or of the true images after they went through a tokenizer."""
    records = list(parse_lines(records_path))
    if not records:
        raise ValueError(f"{records_path} is empty; give a file that tasks.py has written.")
    image_name = "edited" if task == "edit" else "image"
    true = [load_image(records_path.parent / record[image_name]) for record in records]
    if results is None:
        results = list(pass_through(Tokenizers.load(tokenizer), true)) if tokenizer else list(true)
    verdicts = []
    for record, result, image in track(zip(records, results, true, strict=True), label=task, unit="records"):
        judged = load_image(result) if isinstance(result, Path) else result
        verdicts.append(judge(task, record, judged, image.width))
    return summarize(records, verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of right results of a task.", formatter_class=HelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS, help="task of the records")
    parser.add_argument("--records", type=user_path, required=True, help="TASK-heldout.jsonl of tasks.py")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--results", type=user_path, help='JSONL file of {"id", "text"} or {"id", "image"}')
    which.add_argument("--ceiling", type=user_path, metavar="TOKENIZER", help="tokenizer folder: judge the true images")
    which.add_argument("--chance", type=user_path, metavar="TRAIN", help="vqa-train.jsonl: the most frequent answers")
    options = parser.parse_args()
    if options.chance and options.task != "vqa":
        raise ValueError(f"--chance is for --task vqa, not for --task {options.task}.")
    if options.ceiling and options.task in _TEXTS:
        raise ValueError(f"--ceiling is for tasks that generate images, not for --task {options.task}.")
    path = Path(options.records)
    if options.chance:
        share = measure_chance(list(parse_lines(Path(options.chance))), list(parse_lines(path)))
        print(f"the most frequent answer of each kind: {100 * share:.1f} %")
        return
    results = None
    if options.results:
        results = read_results(Path(options.results), list(parse_lines(path)), options.task)
    for name, (share, count) in judge_file(options.task, path, results, options.ceiling or "").items():
        print(f"{name:<28} {100 * share:6.1f} % of {count}")


if __name__ == "__main__":
    run_tool(main)
