"""A question about an image, the files it is read from, and what all readers of such files need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cm3leon.data.tasks.annotations import write_image_name


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, with what its data set says about the answer."""

    key: str
    """Unique among the questions of a file."""
    text: str
    image: Path | None = None
    context: str = ""
    """Text in front of the question: the caption and earlier rounds of a dialog."""
    answers: tuple[str, ...] = ()
    """Human answers; none in a test set."""
    candidates: tuple[str, ...] = ()
    """Answers to choose from."""
    correct: int | None = None
    """Number of the true candidate."""
    relevance: tuple[float, ...] | None = None
    """Relevance of each candidate, where people have judged them."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Groups that have an accuracy of their own: name -> value, such as answer_type -> number."""
    submission: Mapping[str, Any] = field(default_factory=dict)
    """Fields that identify the question in a submission."""


@dataclass(frozen=True, kw_only=True)
class QuestionFiles:
    """Files of a data set."""

    format: str
    """Name of the format: see this package."""
    questions: str
    annotations: str | None = None
    """Answers of vqa, dense relevances of visdial."""
    images: str | None = None
    """Folder of the images; that of the questions by default."""
    image_name: str | None = None
    """Name of an image file as a format string of `image_id`, where it is not the data set's."""
    split: str = "test"
    """Part of scienceqa."""
    raw_answers: bool = False
    """Whether OK-VQA's answers are read as people wrote them (`raw_answer`), not stemmed (`answer`)."""

    @property
    def image_folder(self) -> Path:
        """Where the images are."""
        return Path(self.images) if self.images else Path(self.questions).parent


def build_image_path(files: QuestionFiles, default: str, image_id: object) -> Path:
    """Path of an image file by its id; `default` is the data set's form of the name."""
    return files.image_folder / write_image_name(files.image_name or default, image_id)


def check_choice(correct: object, candidates: Sequence[str], key: str) -> int | None:
    """`correct`, the number of the true candidate, if it is known; ValueError if there is no such candidate."""
    if correct is None:
        return None
    if not isinstance(correct, int) or not 0 <= correct < len(candidates):
        raise ValueError(
            f"question {key}: its answer ({correct!r}) must be a number of its {len(candidates)} candidates."
        )
    return correct
