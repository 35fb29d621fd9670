"""Judging images and captions with a corpus's own checker.

A checker is a Python file with two functions:

    classify(image) -> {attribute: value}                what a PIL image shows
    parse_caption(text) -> {attribute: value} or None    what a caption says; None if that is unclear

such as examples/shapes/checker.py. A corpus without a checker is evaluated without accuracies.
"""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Protocol, cast

from PIL import Image

from megatron_cm3leon.common.threads import one_blas_thread


class Checker(Protocol):
    """A module with the two functions of a checker."""

    def classify(self, image: Image.Image, /) -> dict: ...

    def parse_caption(self, text: str, /) -> dict | None: ...


def load_checker(path: str | Path) -> Checker:
    """Import a checker from its file; ValueError if it is not one. The file is code, which is run."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checker at {path}; give the Python file with the functions classify and parse_caption.")
    spec = importlib.util.spec_from_file_location(f"checker_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"the checker {path} is not a Python file; its name must end with .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"the checker {path} cannot be loaded: {type(error).__name__}: {error}") from error
    for name in ("classify", "parse_caption"):
        if not callable(getattr(module, name, None)):
            raise ValueError(f"the checker {path} has no function {name}.")
    return cast(Checker, module)


def parse_captions(checker: Checker, captions: list[str]) -> list[dict]:
    """The attributes of captions that the checker understands; ValueError for another caption."""
    parsed = []
    for caption in captions:
        attributes = checker.parse_caption(caption)
        if attributes is None:
            raise ValueError(f"the checker does not understand the caption {caption!r}.")
        parsed.append(attributes)
    return parsed


@one_blas_thread()
def judge_images(checker: Checker, images: list[Image.Image], expected: list[dict]) -> list[dict]:
    """For each image {attribute: [expected, found, whether they are equal]}."""
    return [_compare(attributes, checker.classify(image)) for image, attributes in zip(images, expected, strict=True)]


def judge_captions(checker: Checker, texts: list[str], expected: list[dict]) -> list[dict]:
    """Like `judge_images`, for captions; in a caption that cannot be parsed every attribute is wrong."""
    return [
        _compare(attributes, checker.parse_caption(text) or {})
        for text, attributes in zip(texts, expected, strict=True)
    ]


def _compare(expected: dict, found: dict) -> dict:
    return {name: [value, found.get(name), found.get(name) == value] for name, value in expected.items()}


def measure_word_f1(generated: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the words of a caption, regardless of their order and case."""
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (generated, expected))
    common = (left & right).total()
    return 2 * common / (left.total() + right.total()) if common else 0.0


def compute_accuracy(judged: list[dict]) -> dict[str, float]:
    """Share of correct values of each attribute, and of documents with `all` attributes correct."""
    if not judged:
        raise ValueError("there is nothing to judge: the checker understands none of the captions.")
    names = list(judged[0])
    shares = {name: sum(attributes[name][2] for attributes in judged) / len(judged) for name in names}
    shares["all"] = sum(all(entry[2] for entry in attributes.values()) for attributes in judged) / len(judged)
    return shares
