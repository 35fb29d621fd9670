"""Judging pictures and captions with a corpus's own checker.

A checker is a Python file with two functions:

    classify(picture) -> {attribute: value}              what a PIL picture shows
    parse_caption(text) -> {attribute: value} or None    what a caption says; None where that is unclear

such as examples/shapes/checker.py. A corpus without one (`None` everywhere here) is evaluated without accuracies.
"""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

from PIL import Image

from megatron_cm3leon.common.threads import one_blas_thread


def load_checker(path: str | Path) -> ModuleType:
    """Import a checker from its file; ValueError where it is none. It is code: it runs."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checker at {path}; give the Python file that has classify and parse_caption.")
    spec = importlib.util.spec_from_file_location(f"checker_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"the checker {path} cannot be loaded: {type(error).__name__}: {error}") from error
    for name in ("classify", "parse_caption"):
        if not callable(getattr(module, name, None)):
            raise ValueError(f"the checker {path} has no function {name}.")
    return module


@one_blas_thread()
def judge_pictures(checker: ModuleType, pictures: list[Image.Image], wanted: list[dict]) -> list[dict]:
    """For each picture, {attribute: [wanted, found, right]}."""
    judged = []
    for picture, attributes in zip(pictures, wanted, strict=True):
        found = checker.classify(picture)
        judged.append({name: [value, found.get(name), found.get(name) == value] for name, value in attributes.items()})
    return judged


def judge_captions(checker: ModuleType, texts: list[str], wanted: list[dict]) -> list[dict]:
    """The same of captions; one that cannot be parsed is wrong in everything."""
    judged = []
    for text, attributes in zip(texts, wanted, strict=True):
        found = checker.parse_caption(text) or {}
        judged.append({name: [value, found.get(name), found.get(name) == value] for name, value in attributes.items()})
    return judged


def word_f1(made: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words of a caption, whatever their order and case."""
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (made, wanted))
    common = (left & right).total()
    return 2 * common / (left.total() + right.total()) if common else 0.0


def share_right(judged: list[dict]) -> dict[str, float]:
    """Accuracy of each attribute, and `all` of them together."""
    if not judged:
        raise ValueError("there is nothing to judge: no picture whose caption the checker understands.")
    names = list(judged[0])
    shares = {name: sum(one[name][2] for one in judged) / len(judged) for name in names}
    shares["all"] = sum(all(entry[2] for entry in one.values()) for one in judged) / len(judged)
    return shares
