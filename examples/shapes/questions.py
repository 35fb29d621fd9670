"""Questions about scenes, with exact answers: color, shape, size, place, background, count, yes/no, comparisons.

Each kind has phrasings for training and others that are held out. Answers to yes/no questions are yes as often as no.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from examples.shapes.drawing import COLORS, EXTENTS, POSITIONS, SHAPES
from examples.shapes.references import choose_reference
from examples.shapes.scenes import Scene

Words = dict[str, str]
NUMBERS = ("zero", "one", "two", "three")


@dataclass(frozen=True)
class Kind:
    """A kind of question."""

    ask: Callable[[Scene, np.random.Generator, bool], tuple[Words, str] | None]
    """(scene, random, whether a yes is wanted) -> words of a phrasing and the answer; None if the scene has none."""
    train: tuple[str, ...]
    heldout: tuple[str, ...]


def _ask_attribute(name: str) -> Callable:
    def ask(scene: Scene, random: np.random.Generator, yes: bool) -> tuple[Words, str] | None:
        index = int(random.integers(len(scene)))
        reference = choose_reference(scene, index, random, hidden=name)
        return ({"it": reference}, scene[index][name]) if reference else None

    return ask


def _ask_background(scene: Scene, random: np.random.Generator, yes: bool) -> tuple[Words, str]:
    return {}, scene[0]["background"]


def _ask_count(scene: Scene, random: np.random.Generator, yes: bool) -> tuple[Words, str]:
    return {}, NUMBERS[len(scene)]


def _ask_count_of_size(scene: Scene, random: np.random.Generator, yes: bool) -> tuple[Words, str]:
    size = str(random.choice(list(EXTENTS)))
    return {"size": size}, NUMBERS[sum(entry["size"] == size for entry in scene)]


def _ask_exists(scene: Scene, random: np.random.Generator, yes: bool) -> tuple[Words, str] | None:
    present = [(entry["colour"], entry["shape"]) for entry in scene]
    if yes:
        color, shape = present[int(random.integers(len(present)))]
    else:  # one of the two words is of an object of the scene, so that one word alone does not give the answer
        color, shape = present[int(random.integers(len(present)))]
        if random.integers(2):
            color = str(random.choice(list(COLORS)))
        else:
            shape = str(random.choice(SHAPES))
        if (color, shape) in present:
            return None
    words = f"{color} {shape}"
    return {"a_thing": f"{'an' if words[0] in 'aeiou' else 'a'} {words}"}, _say(yes)


def _ask_attribute_holds(scene: Scene, random: np.random.Generator, yes: bool) -> tuple[Words, str] | None:
    index = int(random.integers(len(scene)))
    name = str(random.choice(["colour", "size"]))
    reference = choose_reference(scene, index, random, hidden=name)
    if not reference:
        return None
    values = list(COLORS if name == "colour" else EXTENTS)
    true = scene[index][name]
    value = true if yes else str(random.choice([value for value in values if value != true]))
    return {"it": reference, "value": value}, _say(yes)


def _ask_comparison(holds: Callable[[dict, dict], bool], hidden: str) -> Callable:
    """Two objects for which `holds(first, second)` is as wanted."""

    def ask(scene: Scene, random: np.random.Generator, yes: bool) -> tuple[Words, str] | None:
        if len(scene) < 2:
            return None
        first, second = (int(index) for index in random.choice(len(scene), 2, replace=False))
        if holds(scene[first], scene[second]) != yes:
            return None
        it, other = (choose_reference(scene, index, random, hidden) for index in (first, second))
        return ({"it": it, "other": other}, _say(yes)) if it and other else None

    return ask


def _say(yes: bool) -> str:
    return "yes" if yes else "no"


def _is_left(first: dict, second: dict) -> bool:
    return POSITIONS[first["position"]][1] < POSITIONS[second["position"]][1]


def _is_above(first: dict, second: dict) -> bool:
    return POSITIONS[first["position"]][0] < POSITIONS[second["position"]][0]


KINDS: dict[str, Kind] = {
    "color": Kind(
        _ask_attribute("colour"),
        ("What color is the {it}?", "Which color does the {it} have?", "What is the color of the {it}?"),
        ("Name the color of the {it}.", "The {it} has which color?"),
    ),
    "shape": Kind(
        _ask_attribute("shape"),
        ("What is the {it}?", "Which shape is the {it}?", "What kind of shape is the {it}?"),
        ("Name the {it}.", "The {it} is of what kind?"),
    ),
    "size": Kind(
        _ask_attribute("size"),
        ("How big is the {it}?", "What size is the {it}?", "Is the {it} small or large?"),
        ("Name the size of the {it}.", "The {it} has which size?"),
    ),
    "place": Kind(
        _ask_attribute("position"),
        ("Where is the {it}?", "In which place is the {it}?", "What is the place of the {it}?"),
        ("Name the place of the {it}.", "The {it} is where?"),
    ),
    "background": Kind(
        _ask_background,
        ("What color is the background?", "Which color does the background have?", "How is the background colored?"),
        ("Name the color of the background.", "The background has which color?"),
    ),
    "count": Kind(
        _ask_count,
        ("How many shapes are there?", "How many shapes are in the image?", "What is the number of shapes?"),
        ("Count the shapes.", "The image has how many shapes?"),
    ),
    "count of a size": Kind(
        _ask_count_of_size,
        ("How many {size} shapes are there?", "How many shapes are {size}?", "What is the number of {size} shapes?"),
        ("Count the {size} shapes.", "The image has how many {size} shapes?"),
    ),
    "exists": Kind(
        _ask_exists,
        ("Is there {a_thing}?", "Does the image show {a_thing}?", "Is {a_thing} in the image?"),
        ("Can {a_thing} be seen?", "Does the image have {a_thing}?"),
    ),
    "attribute holds": Kind(
        _ask_attribute_holds,
        ("Is the {it} {value}?", "Is it true that the {it} is {value}?", "The {it} is {value}, yes or no?"),
        ("Yes or no: is the {it} {value}?", "Would one say that the {it} is {value}?"),
    ),
    "larger": Kind(
        _ask_comparison(lambda first, second: (first["size"], second["size"]) == ("large", "small"), hidden="size"),
        ("Is the {it} larger than the {other}?", "Is the {it} bigger than the {other}?",
         "Does the {it} have a larger size than the {other}?"),
        ("Yes or no: is the {it} larger than the {other}?", "Of both, is the {it} bigger than the {other}?"),
    ),
    "same size": Kind(
        _ask_comparison(lambda first, second: first["size"] == second["size"], hidden="size"),
        ("Do the {it} and the {other} have the same size?", "Is the {it} as large as the {other}?",
         "Are the {it} and the {other} of the same size?"),
        ("Yes or no: do the {it} and the {other} have the same size?", "Have the {it} and the {other} the same size?"),
    ),
    "left": Kind(
        _ask_comparison(_is_left, hidden="position"),
        ("Is the {it} left of the {other}?", "Is the {it} to the left of the {other}?",
         "Is the {other} to the right of the {it}?"),
        ("Yes or no: is the {it} left of the {other}?", "Does one see the {it} to the left of the {other}?"),
    ),
    "above": Kind(
        _ask_comparison(_is_above, hidden="position"),
        ("Is the {it} above the {other}?", "Is the {it} higher than the {other}?",
         "Is the {other} below the {it}?"),
        ("Yes or no: is the {it} above the {other}?", "Does one see the {it} above the {other}?"),
    ),
}  # fmt: skip
"""Name -> kind of question."""


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    kind: str
    text: str
    answer: str


def ask_question(scene: Scene, kind: str, yes: bool, heldout: bool, random: np.random.Generator) -> Question | None:
    """A question of a kind about a scene, in a phrasing of training or a held-out one; None if the scene has none.

    `yes`: the wanted answer of a yes/no question.
    """
    asked = KINDS[kind].ask(scene, random, yes)
    if asked is None:
        return None
    words, answer = asked
    phrasings = KINDS[kind].heldout if heldout else KINDS[kind].train
    return Question(kind, phrasings[int(random.integers(len(phrasings)))].format(**words), answer)
