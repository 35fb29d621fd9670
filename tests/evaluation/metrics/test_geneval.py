"""GenEval's rules, on objects written by hand, and its prompts."""

import json

import numpy as np
import pytest

from megatron_cm3leon.evaluation.metrics.geneval import judge_objects, mean_of_groups, read_prompts, relate


def place(name, color="red", left=0, top=0, side=10):
    return {"name": name, "color": color, "box": (left, top, left + side, top + side)}


DOG, CAT = place("dog", "red", left=40), place("cat", "blue", left=0)


@pytest.mark.parametrize(
    ("found", "prompt", "reason"),
    [
        ([DOG], {"include": [{"class": "dog", "count": 1}]}, ""),
        ([CAT], {"include": [{"class": "dog", "count": 1}]}, "expected dog>=1, found 0"),
        ([DOG, CAT], {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}, ""),
        ([DOG] * 3, {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
         "expected dog<3, found 3"),
        ([DOG], {"include": [{"class": "dog", "count": 1, "color": "blue"}]}, "expected blue dog, found red"),
        # The most certain object is judged, not the one that would be correct.
        ([DOG, place("dog", "blue")], {"include": [{"class": "dog", "count": 1, "color": "blue"}]},
         "expected blue dog, found red"),
        ([DOG, CAT], {"include": [{"class": "cat", "count": 1},
                                  {"class": "dog", "count": 1, "position": ["right of", 0]}]}, ""),
        ([DOG, CAT], {"include": [{"class": "cat", "count": 1},
                                  {"class": "dog", "count": 1, "position": ["above", 0]}]},
         "expected dog above target, found right of target"),
        ([DOG], {"include": [{"class": "cat", "count": 1},
                             {"class": "dog", "count": 1, "position": ["above", 0]}]},
         "expected cat>=1, found 0; no target for dog to be above"),
    ],
)  # fmt: skip
def test_rules(found, prompt, reason):
    assert judge_objects(found, prompt) == reason


def test_relations():
    # Sides of 10 pixels: centers within 2 pixels are neither beside nor above each other.
    assert relate((2, 0, 12, 10), (0, 0, 10, 10)) == set()
    assert relate((3, 0, 13, 10), (0, 0, 10, 10)) == set()  # 1 of 3 pixels counts, not more than half
    assert relate((5, 0, 15, 10), (0, 0, 10, 10)) == {"right of"}
    assert relate((0, 40, 10, 50), (0, 0, 10, 10)) == {"below"}
    assert relate((0, 0, 10, 10), (40, 40, 50, 50)) == {"left of", "above"}


def test_score_is_the_mean_of_group_means():
    # Group 0: 1 and 0; group 2: 0.5 three times; group 1 has no item.
    items = np.array([[0, 1.0], [0, 0.0], [2, 0.5], [2, 0.5], [2, 0.5]])
    assert mean_of_groups(items) == pytest.approx(0.5)
    assert mean_of_groups(items[[0, 2, 3]]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not valid JSON"),
        ('{"prompt": "a dog", "include": [{"class": "dog", "count": 1}]}', r"tag \(None\) must be a text"),
        ('{"tag": "x", "prompt": "a dog", "include": []}', r"include \(\[\]\) must be a list"),
        ('{"tag": "x", "prompt": "a dog", "include": [{"class": "dog", "count": 0}]}', r"count \(0\) of dog"),
        ('{"tag": "x", "prompt": "a dog", "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}',
         "an earlier entry"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, fault):
    good = json.dumps({"tag": "x", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]})
    (tmp_path / "prompts.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=rf"prompts.jsonl:2: .*{fault}"):
        read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(tmp_path / "empty.jsonl")
