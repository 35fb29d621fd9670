"""Scenes of one to three colored shapes: what a scene contains, its image and its captions.

A scene is a list of attributes, one entry per object, as in drawing.py; all objects have the same background. Several
objects are in different corners and are shifted together, so that they never touch.
"""

import numpy as np

from examples.shapes.drawing import COLORS, JITTERS, PHRASINGS, POSITIONS, draw_image, draw_mask, write_caption

MOST_OBJECTS = 3
CORNERS = tuple(position for position in POSITIONS if position != "centre")
Scene = list[dict[str, str]]

_OBJECT = "a {size} {colour} {shape} in the {position} corner"
SCENE_PHRASINGS = (
    "{objects} on a {background} background",
    "on {background}, {objects}",
    "a {background} background with {objects}",
    "{count} shapes on a {background} background: {objects}",
)
_COUNTS = {2: "two", 3: "three"}


def choose_scenes(combinations: Scene, pairs: int, objects: int, seed: int) -> list[tuple[Scene, tuple[int, int], int]]:
    """Choose (scene, jitter, phrasing) of each pair: one to `objects` objects, each number equally often.

    combinations: the attributes of the split (generate.split_combinations); every object of a scene is one of them.
    """
    if not 1 <= objects <= MOST_OBJECTS:
        raise ValueError(f"--objects ({objects}) must be from 1 to {MOST_OBJECTS}.")
    random = np.random.default_rng((seed, 2, len(combinations), objects))
    at: dict[tuple[str, str], Scene] = {}
    for attributes in combinations:
        at.setdefault((attributes["background"], attributes["position"]), []).append(attributes)
    chosen = []
    for number in range(pairs):
        count = 1 + number % objects
        first = combinations[int(random.integers(len(combinations)))]
        scene = [first]
        if count > 1:
            corners = random.permutation([corner for corner in CORNERS if (first["background"], corner) in at])
            several = [at[first["background"], corner] for corner in corners[:count]]
            scene = [entries[int(random.integers(len(entries)))] for entries in several]
        phrasings = PHRASINGS if len(scene) == 1 else len(SCENE_PHRASINGS)
        chosen.append((scene, JITTERS[int(random.integers(len(JITTERS)))], int(random.integers(phrasings))))
    return chosen


def draw_scene(scene: Scene, jitter: tuple[int, int], image_size: int) -> np.ndarray:
    """One image, uint8 [image_size, image_size, 3]."""
    image = draw_image(scene[0], jitter, image_size)
    for attributes in scene[1:]:
        mask = draw_mask(attributes["shape"], attributes["size"], attributes["position"], jitter, image_size)
        image[mask] = COLORS[attributes["colour"]]
    return image


def write_scene_caption(scene: Scene, phrasing: int) -> str:
    """A caption that names the background and all attributes of each object; a single one is described as in
    drawing.write_caption."""
    if len(scene) == 1:
        return write_caption(scene[0], phrasing)
    phrases = [_OBJECT.format(**attributes) for attributes in scene]
    listed = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    words = {"objects": listed, "background": scene[0]["background"], "count": _COUNTS[len(scene)]}
    return SCENE_PHRASINGS[phrasing].format(**words)
