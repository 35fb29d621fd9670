"""GenEval (arXiv 2310.11513): does an image show the objects, the number, the colors and the positions of its prompt?

The prompts and the rules are those of https://github.com/djghosh13/geneval (evaluation/evaluate_images.py and
summary_scores.py); the objects come from a checker of the corpus instead of its detector. A line of a prompts file:

    {"tag": "position", "prompt": "a photo of a dog right of a tv",
     "include": [{"class": "tv", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}

`include` are required objects: at least `count` of a `class`, of a `color`, at a `position` relative to the objects of
an earlier entry. `exclude` are forbidden ones: `count` of a `class` or more.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from megatron_cm3leon.evaluation.text_files import read_text

GROUPS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""Tags of GenEval's groups. A file may have others: each tag is a group."""
RELATIONS = ("left of", "right of", "above", "below")
POSITION_THRESHOLD = 0.1
"""Share of the sum of both widths (heights) by which two centers must differ to be beside (above) each other."""


class FoundObject(TypedDict):
    """An object of an image; a checker lists the most certain one first."""

    name: str
    """What GenEval's prompts call `class`."""
    color: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""


def read_prompts(path: str | Path) -> list[dict]:
    """The prompts of a file in GenEval's format, one JSON object per line; ValueError names the line and the fault."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no prompts at {path}; give a file such as GenEval's prompts/evaluation_metadata.jsonl.")
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            fault = _find_fault(line)
            if fault:
                raise ValueError(f"{path}:{number}: {fault}; GenEval's prompts have tag, prompt, include and exclude.")
            prompts.append(json.loads(line))
    if not prompts:
        raise ValueError(f"{path} has no prompts; give at least one line.")
    return prompts


def _find_fault(line: str) -> str:
    """What is wrong with a line; empty if nothing is."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        return f"not valid JSON ({error})"
    if not isinstance(entry, dict):
        return "not a JSON object"
    for key in ("tag", "prompt"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            return f"{key} ({entry.get(key)!r}) must be a text"
    if not isinstance(entry.get("include"), list) or not entry["include"]:
        return f"include ({entry.get('include')!r}) must be a list of objects"
    if not isinstance(entry.get("exclude", []), list):
        return f"exclude ({entry['exclude']!r}) must be a list of objects"
    for index, one in enumerate([*entry["include"], *entry.get("exclude", [])]):
        if not isinstance(one, dict) or not isinstance(one.get("class"), str):
            return f"{one!r} must name a class"
        if not isinstance(one.get("count"), int) or one["count"] < 1:
            return f"count ({one.get('count')!r}) of {one['class']} must be a whole number from 1"
        position = one.get("position")
        if position is not None and not _is_position(position, min(index, len(entry["include"]))):
            return (
                f"position ({position!r}) of {one['class']} must be one of {', '.join(RELATIONS)} and the number of "
                f"an earlier entry of include"
            )
    return ""


def _is_position(position: object, earlier: int) -> bool:
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, target = position
    return relation in RELATIONS and isinstance(target, int) and 0 <= target < earlier


def judge_objects(found: Sequence[FoundObject], prompt: dict) -> str:
    """Why the objects of an image do not satisfy a prompt; empty if they do.

    As GenEval: of more objects of a class than required, the most certain ones are judged.
    """
    by_class: dict[str, list[FoundObject]] = {}
    for one in found:
        by_class.setdefault(one["name"], []).append(one)
    reasons: list[str] = []
    matched: list[list[FoundObject] | None] = []
    for required in prompt["include"]:
        name, count = required["class"], required["count"]
        objects = by_class.get(name, [])[:count]
        reason = ""
        if len(objects) < count:
            reason = f"expected {name}>={count}, found {len(objects)}"
        elif "color" in required and any(one["color"] != required["color"] for one in objects):
            reason = f"expected {required['color']} {name}, found {', '.join(one['color'] for one in objects)}"
        elif "position" in required:
            reason = _judge_position(objects, required, matched)
        matched.append(None if reason else objects)
        reasons += [reason] if reason else []
    for excluded in prompt.get("exclude", []):
        objects = by_class.get(excluded["class"], [])
        if len(objects) >= excluded["count"]:
            reasons.append(f"expected {excluded['class']}<{excluded['count']}, found {len(objects)}")
    return "; ".join(reasons)


def _judge_position(objects: list[FoundObject], required: dict, matched: list[list[FoundObject] | None]) -> str:
    relation, target = required["position"]
    targets = matched[target]
    if targets is None:
        return f"no target for {required['class']} to be {relation}"
    for one in objects:
        for other in targets:
            relations = relate(one["box"], other["box"])
            if relation not in relations:
                return f"expected {required['class']} {relation} target, found {' and '.join(sorted(relations))} target"
    return ""


def relate(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """The relations of RELATIONS in which `box` is to `other`: none, one, or two of a diagonal.

    Boxes are (left, top, right, bottom) with y downwards.
    """
    corners = np.array([box, other], np.float64).reshape(2, 2, 2)  # box, corner, axis
    offset = np.subtract(*corners.mean(axis=1))
    dead_zone = POSITION_THRESHOLD * np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    revised = np.maximum(np.abs(offset) - dead_zone, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    right, down = revised / np.linalg.norm(offset)
    shares = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {relation for relation, share in shares.items() if share > 0.5}


def mean_of_groups(items: np.ndarray) -> float:
    """GenEval's score, the mean of the means of the groups, of items [n, 2]: number of the group, share correct.

    Groups without an item, which a bootstrap sample can have, do not count.
    """
    groups = items[:, 0].astype(np.int64)
    sums, counts = np.bincount(groups, items[:, 1]), np.bincount(groups)
    return float((sums[counts > 0] / counts[counts > 0]).mean())
