"""The checker of several shapes finds what was drawn, also blurred, and nothing in an empty image."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from examples.shapes.drawing import BACKGROUNDS, COLORS, draw_mask
from examples.shapes.geneval import build_prompts, find_objects
from megatron_cm3leon.evaluation.metrics.geneval import GROUPS, judge_objects

SCENE = [("circle", "large", "top left", "red"), ("ring", "small", "top right", "red"),
         ("cross", "large", "bottom right", "blue")]  # fmt: skip


def draw(objects, size=32, background="white"):
    image = np.empty((size, size, 3), np.uint8)
    image[:] = BACKGROUNDS[background]
    for shape, extent, position, color in objects:
        image[draw_mask(shape, extent, position, (1, -1), size)] = COLORS[color]
    return Image.fromarray(image)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("blur", [0, 0.8])
def test_objects_are_found(background, blur):
    for count in range(4):
        image = draw(SCENE[:count], background=background).filter(ImageFilter.GaussianBlur(blur))
        found = [(one["name"], one["size"], one["color"]) for one in find_objects(image)]
        assert sorted(found) == sorted((shape, size, color) for shape, size, _, color in SCENE[:count])


def test_boxes_are_where_the_objects_are():
    [found] = find_objects(draw(SCENE[:1], size=64))
    mask = draw_mask("circle", "large", "top left", (1, -1), 64)
    rows, columns = np.nonzero(mask)
    expected = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert found["box"] == pytest.approx(expected, abs=1.5)


def test_prompts_of_every_group_are_judged():
    prompts = build_prompts(3, seed=0)
    assert [prompt["tag"] for prompt in prompts] == [group for group in GROUPS for _ in range(3)]
    position = {"include": [{"class": "circle", "count": 1},
                            {"class": "cross", "count": 1, "position": ["below", 0]}]}  # fmt: skip
    found = find_objects(draw(SCENE))
    assert judge_objects(found, position) == ""
    position["include"][1]["position"][0] = "left of"
    assert judge_objects(found, position) == "expected cross left of target, found below and right of target"
