"""How a question or an instruction names one object of a scene, so that no other object is meant."""

import itertools

import numpy as np

from examples.shapes.scenes import Scene

PLACES = {
    "top left": "in the top left corner",
    "top right": "in the top right corner",
    "centre": "in the centre",
    "bottom left": "in the bottom left corner",
    "bottom right": "in the bottom right corner",
}
MOST_ATTRIBUTES = 2
"""Attributes that a reference names, at most, where that many are enough."""
_NAMED = ("size", "colour", "shape", "position")


def describe_object(attributes: dict[str, str], named: tuple[str, ...]) -> str:
    """Words for an object by some of its attributes, without an article: "red circle", "shape in the centre"."""
    adjectives = [attributes[name] for name in ("size", "colour") if name in named]
    noun = attributes["shape"] if "shape" in named else "shape"
    place = [PLACES[attributes["position"]]] if "position" in named else []
    return " ".join([*adjectives, noun, *place])


def list_references(scene: Scene, index: int, hidden: str = "") -> list[str]:
    """Every way to name object `index` of a scene by attributes other than `hidden` that no other object shares.

    Those of at most two attributes; those of three or more only if there are none.
    """
    names = [name for name in _NAMED if name != hidden]
    subsets = [each for count in range(1, len(names) + 1) for each in itertools.combinations(names, count)]
    unique = [each for each in subsets if sum(_fits(other, scene[index], each) for other in scene) == 1]
    short = [each for each in unique if len(each) <= MOST_ATTRIBUTES]
    return [describe_object(scene[index], each) for each in short or unique]


def choose_reference(scene: Scene, index: int, random: np.random.Generator, hidden: str = "") -> str | None:
    """One of `list_references`; None if there is none."""
    found = list_references(scene, index, hidden)
    return found[int(random.integers(len(found)))] if found else None


def _fits(other: dict[str, str], attributes: dict[str, str], named: tuple[str, ...]) -> bool:
    return all(other[name] == attributes[name] for name in named)
