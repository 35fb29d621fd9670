"""Determine the objects that images and captions of scenes show: one to three colored shapes (generate.py --objects 3).

As in checker.py, an image is compared with templates by squared error. Objects do not overlap, so each lowers the error
of the empty background by an amount of its own: the best template of each corner is an object if it explains half of
its own contrast. `classify` and `parse_caption` return one dictionary with the same keys for every scene, which
tools/evaluate.py --checker compares: the number of objects, their colors, shapes, sizes and positions (each sorted, so
that swapped attributes are equal there), the background, and `objects`, where every attribute is at its object.

    python examples/shapes/scene_checker.py --input generated.jsonl     accuracy of images against their captions
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for running this file as a script

from examples.shapes import checker
from examples.shapes.drawing import ATTRIBUTES, BACKGROUNDS, COLORS, EXTENTS, JITTERS, POSITIONS, SHAPES
from examples.shapes.scenes import CORNERS, MOST_OBJECTS, Scene
from megatron_cm3leon.common.cli import HelpFormatter, run_tool

EXPLAINED = 0.5
"""Share of a template's own contrast by which it must lower the error."""
_OBJECT = re.compile(
    rf"\b({'|'.join(EXTENTS)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) in the ({'|'.join(CORNERS)}) corner\b"
)
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b")
_WORDS = re.compile(rf"\b({'|'.join([*COLORS, *SHAPES, *EXTENTS])})\b")


def describe_scene(scene: Scene) -> dict[str, object]:
    """What is compared of a scene; ready for JSON."""
    described: dict[str, object] = {"count": len(scene), "background": scene[0]["background"]}
    for name in ("colour", "shape", "size", "position"):
        described[name] = sorted(attributes[name] for attributes in scene)
    described["objects"] = sorted(" ".join(attributes[name] for name in ATTRIBUTES) for attributes in scene)
    return described


def parse_scene(text: str) -> Scene | None:
    """The objects that a caption names; None unless it names one background and one to three complete objects."""
    text = " ".join(text.lower().split())
    single = checker.parse_caption(text)
    if single:
        return [single]
    found, backgrounds = _OBJECT.findall(text), _BACKGROUND.findall(text)
    if not 2 <= len(found) <= MOST_OBJECTS or len(backgrounds) != 1 or len(_WORDS.findall(text)) != 3 * len(found):
        return None
    if len({position for *_, position in found}) != len(found):
        return None
    return [
        {"colour": colour, "shape": shape, "size": size, "position": position, "background": backgrounds[0]}
        for size, colour, shape, position in found
    ]


def parse_caption(text: str) -> dict[str, object] | None:
    """`describe_scene` of a caption; None if `parse_scene` cannot read it."""
    scene = parse_scene(text)
    return describe_scene(scene) if scene else None


def find_objects(image) -> Scene:
    """The objects of the scene that fits the image best; `image` as in checker.classify_with_error."""
    array = checker.to_array(image)
    _, masks, sums, squares = checker.load_masks(array.shape[0])
    pixels = array.reshape(-1, 3)
    colors, backgrounds = np.array(list(COLORS.values())), np.array(list(BACKGROUNDS.values()))
    contrast = colors[:, None] - backgrounds[None]  # [colors, backgrounds, 3]
    covered = (masks @ pixels)[:, None] - sums[:, None, None] * backgrounds  # [masks, backgrounds, 3]
    energy = squares[:, None, None] * (contrast**2).sum(axis=2)  # [masks, colors, backgrounds]
    change = energy - 2 * np.einsum("mbx,cbx->mcb", covered, contrast)
    shape = (2, len(SHAPES), len(EXTENTS), len(POSITIONS), len(JITTERS), len(COLORS), len(BACKGROUNDS))
    # Templates to the end: [sharp or blurred, position, jitter, background, shape x size x color]
    change, energy = (
        values.reshape(shape).transpose(0, 3, 4, 6, 1, 2, 5).reshape(2, len(POSITIONS), len(JITTERS), 3, -1)
        for values in (change, energy)
    )
    best = change.argmin(axis=-1)
    lowered = np.take_along_axis(change, best[..., None], -1)[..., 0]
    own = np.take_along_axis(energy, best[..., None], -1)[..., 0]
    lowered = np.where(lowered <= -EXPLAINED * own, lowered, 0.0)  # [2, positions, jitters, backgrounds]
    empty = np.array([((pixels - background) ** 2).sum() for background in backgrounds])
    positions = list(POSITIONS)
    corners = lowered[:, [positions.index(corner) for corner in CORNERS]]
    several = np.sort(corners, axis=1)[:, :MOST_OBJECTS].sum(axis=1) + empty  # [2, jitters, backgrounds]
    blurred, jitter, background = np.unravel_index(several.argmin(), several.shape)
    single, error = checker.classify_with_error(image)
    if several.min() >= array.size * error**2 - 1e-3:
        return [single]
    order = np.argsort(corners[blurred, :, jitter, background])[:MOST_OBJECTS]
    scene = []
    for corner in order[corners[blurred, order, jitter, background] < 0]:
        template = best[blurred, positions.index(CORNERS[corner]), jitter, background]
        shape_of, size, color = np.unravel_index(template, (len(SHAPES), len(EXTENTS), len(COLORS)))
        scene.append(
            {
                "colour": list(COLORS)[color],
                "shape": SHAPES[shape_of],
                "size": list(EXTENTS)[size],
                "position": CORNERS[corner],
                "background": list(BACKGROUNDS)[background],
            }
        )
    return scene or [single]


def classify(image) -> dict[str, object]:
    """`describe_scene` of an image."""
    return describe_scene(find_objects(image))


def judge_file(path: str | Path) -> dict[str, float]:
    """Share of the images of a JSONL file (one {"image", "caption"} per line) that show each part of their captions."""
    path = Path(path)
    hits = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = json.loads(line)
        expected = parse_caption(fields["caption"])
        if expected is None:
            raise ValueError(
                f"{path}:{number}: {fields['caption']!r} does not name a background and one to {MOST_OBJECTS} complete "
                f"objects; give captions of examples/shapes/generate.py --objects {MOST_OBJECTS}."
            )
        with Image.open(path.parent / fields["image"]) as image:
            found = classify(image)
        hits.append({name: found[name] == value for name, value in expected.items()})
    if not hits:
        raise ValueError(f"{path} is empty; give at least one line of an image and its caption.")
    return {name: float(np.mean([hit[name] for hit in hits])) for name in hits[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Share of images that show the objects of their captions.", formatter_class=HelpFormatter
    )
    parser.add_argument("--input", required=True, help='JSONL file of {"image", "caption"}, paths relative to it')
    options = parser.parse_args()
    for name, share in judge_file(options.input).items():
        print(f"{name:<10} {100 * share:6.1f} %")


if __name__ == "__main__":
    run_tool(main)
