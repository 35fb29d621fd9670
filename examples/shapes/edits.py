"""Edits of scenes: the scene before, an instruction, and the scene after, where one object differs and nothing else."""

from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from examples.shapes.drawing import ATTRIBUTES
from examples.shapes.references import PLACES, choose_reference
from examples.shapes.scenes import CORNERS, Scene


@dataclass(frozen=True)
class Kind:
    """A kind of edit."""

    attribute: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "recolor": Kind(
        "colour",
        ("Make the {it} {new}.", "Change the color of the {it} to {new}.", "Color the {it} {new}.",
         "The {it} should be {new}."),
        ("Paint the {it} {new}.", "Give the {it} the color {new}."),
    ),
    "move": Kind(
        "position",
        ("Move the {it} to the {new}.", "Put the {it} in the {new}.", "Change the place of the {it} to the {new}.",
         "The {it} should be in the {new}."),
        ("Bring the {it} to the {new}.", "Give the {it} a place in the {new}."),
    ),
    "resize": Kind(
        "size",
        ("Make the {it} {new}.", "Change the size of the {it} to {new}.", "Resize the {it} to {new}.",
         "The {it} should be {new}."),
        ("Give the {it} a {new} size.", "Let the {it} become {new}."),
    ),
    "change shape": Kind(
        "shape",
        ("Change the {it} to {a_new}.", "Replace the {it} by {a_new}.", "Make the {it} {a_new}.",
         "The {it} should be {a_new}."),
        ("Turn the {it} into {a_new}.", "Let the {it} become {a_new}."),
    ),
}  # fmt: skip
"""Name -> kind of edit."""


@dataclass(frozen=True)
class Edit:
    """An edit of the object `index`."""

    kind: str
    instruction: str
    before: Scene
    after: Scene
    index: int


def choose_edit(
    after: Scene, kind: str, allowed: Set[tuple[str, ...]], heldout: bool, random: np.random.Generator
) -> Edit | None:
    """An edit whose result is the scene `after`; None if there is none.

    allowed: combinations (attribute values in the order of ATTRIBUTES) that the object may have before.
    """
    described = KINDS[kind]
    index = int(random.integers(len(after)))
    values = [value for value in ATTRIBUTES[described.attribute] if value != after[index][described.attribute]]
    if described.attribute == "position" and len(after) > 1:
        taken = {entry["position"] for entry in after}
        values = [value for value in values if value in CORNERS and value not in taken]
    befores = [after[index] | {described.attribute: value} for value in values]
    befores = [entry for entry in befores if tuple(entry[name] for name in ATTRIBUTES) in allowed]
    if not befores:
        return None
    before = [*after]
    before[index] = befores[int(random.integers(len(befores)))]
    reference = choose_reference(before, index, random)
    assert reference, "objects of a scene are in different places"
    new = after[index][described.attribute]
    place = PLACES[new].removeprefix("in the ") if described.attribute == "position" else new
    phrasings = described.heldout if heldout else described.train
    instruction = phrasings[int(random.integers(len(phrasings)))].format(
        it=reference, new=place, a_new=f"{'an' if new.startswith((*'aeiou', 'hourglass')) else 'a'} {new}"
    )
    return Edit(kind, instruction, before, after, index)
