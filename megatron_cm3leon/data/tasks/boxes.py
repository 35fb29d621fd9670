"""Objects with boxes as text: `dog at 12 30 58 94, cat at 60 41 99 95`.

A box is left, top, right and bottom of an object in the square image that the model sees, each as two digits: 00 is the
left or top edge, 99 the right or bottom one. So a box always has four numbers of two digits, whatever the size of the
image, and a number is one word, of which there are 100: a text tokenizer that has seen them needs one piece for each.
An edge moves by at most 0.5 % of the image's side.

In a record, `box` is [left, top, right, bottom] and `bbox` is COCO's [left, top, width, height]: in pixels if the
record has `width` and `height`, otherwise as fractions of the image.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cm3leon.data.sources.rows import Unusable

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as fractions of width and height."""
STEPS = 99
"""Number that stands for the right and the bottom edge."""
NAME_FIELDS = ("name", "label", "category")
_TOLERANCE = 1e-3
"""By how much of a side a box may leave the image: data sets round their boxes."""
_BOX = r" at (\d\d) (\d\d) (\d\d) (\d\d)"
_OBJECT = re.compile(rf"\s*((?:(?!{_BOX.replace('(', '(?:')}).)+){_BOX}\s*(?:,|$)", re.DOTALL)


@dataclass(frozen=True)
class BoxedObject:
    """What is in a box."""

    name: str
    box: Box


def write_objects(objects: Sequence[BoxedObject]) -> str:
    """Objects as text, in their order."""
    return ", ".join(f"{one.name} at {' '.join(f'{round(edge * STEPS):02d}' for edge in one.box)}" for one in objects)


def read_objects(text: str) -> list[BoxedObject]:
    """Objects of a text such as `write_objects` writes; ValueError for any other text."""
    objects, position = [], 0
    while position < len(text.rstrip()):
        found = _OBJECT.match(text, position)
        if not found:
            raise ValueError(
                f"objects ({text[position:][:60]!r}) must be written as NAME at LEFT TOP RIGHT BOTTOM, with two digits "
                f"for each edge and commas between objects."
            )
        left, top, right, bottom = (int(number) / STEPS for number in found.groups()[1:])
        objects.append(BoxedObject(found[1], (left, top, right, bottom)))
        position = found.end()
    return objects


def parse_objects(value: object, width: object, height: object) -> list[BoxedObject]:
    """Objects of a record; `width` and `height`: the image's, in pixels, None where boxes are fractions.

    Raises Unusable for a value of another form, and for a box that is empty or not inside the image.
    """
    if not isinstance(value, list) or not value:
        raise Unusable("no boxes: the objects are not a list of names and boxes")
    if (width is None) != (height is None):
        raise Unusable("box without a unit: the record has only one of width and height")
    scale = []
    for name, length in (("width", width), ("height", height)):
        if length is not None and (not _is_number(length) or not length > 0):  # type: ignore[operator]  # a number
            raise Unusable(f"box without a unit: {name} ({length!r}) is not a number of pixels")
        scale.append(1.0 if length is None else float(length))  # type: ignore[arg-type]  # a number
    return [_parse_object(one, number, scale, width is None) for number, one in enumerate(value, 1)]


def _parse_object(one: object, number: int, scale: list[float], fractions: bool) -> BoxedObject:
    name = next((one[key] for key in NAME_FIELDS if key in one), None) if isinstance(one, dict) else None
    if not isinstance(one, dict) or not isinstance(name, str) or not name.strip():
        raise Unusable(f'no boxes: object {number} is not {{"name": text, "box": [left, top, right, bottom]}}')
    given = one.get("box", one.get("bbox"))
    if not isinstance(given, list | tuple) or len(given) != 4 or not all(map(_is_number, given)):
        raise Unusable(f"no boxes: object {number} ({name}) has no box of four numbers")
    left, top, right, bottom = given if "box" in one else (given[0], given[1], given[0] + given[2], given[1] + given[3])
    edges = (left / scale[0], top / scale[1], right / scale[0], bottom / scale[1])
    if not all(-_TOLERANCE <= edge <= 1 + _TOLERANCE for edge in edges):
        unit = "fractions of 0 to 1" if fractions else f"pixels of {scale[0]:g} x {scale[1]:g}"
        hint = "; give width and height for boxes in pixels" if fractions else ""
        raise Unusable(f"box outside the image: {list(given)} of object {number} ({name}), in {unit}{hint}")
    left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in edges)
    if not (left < right and top < bottom):
        raise Unusable(f"empty box: {list(given)} of object {number} ({name})")
    return BoxedObject(name.strip(), (left, top, right, bottom))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def move_to_square(objects: Sequence[BoxedObject], size: tuple[int, int], fit: str) -> list[BoxedObject]:
    """Objects in the square that preprocessing makes of an image of `size` (width, height) with `--fit`.

    With crop, boxes are cut at the edges of the largest centered square. Raises Unusable if one is not in it at all.
    """
    width, height = size
    side = min(size) if fit == "crop" else max(size)
    moved = []
    for one in objects:
        left, right = (((edge - 0.5) * width) / side + 0.5 for edge in (one.box[0], one.box[2]))
        top, bottom = (((edge - 0.5) * height) / side + 0.5 for edge in (one.box[1], one.box[3]))
        box = tuple(min(max(edge, 0.0), 1.0) for edge in (left, top, right, bottom))
        if not (box[0] < box[2] and box[1] < box[3]):
            raise Unusable(
                f"box outside the image: {one.name} is not in the square that --fit crop keeps of {width} x {height} "
                f"pixels; --fit pad keeps the whole image"
            )
        moved.append(BoxedObject(one.name, (box[0], box[1], box[2], box[3])))
    return moved
