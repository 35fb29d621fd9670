"""Answers of a model to questions: generated freely, or chosen among candidates by their likelihood.

Both complete CM3Leon's template (table 5), with in-context examples in front as retrieved documents are:

    </s> example <break> ... context Question: text Answer: <sentinel:0>. <break> image </s> <sentinel:0>
                                                                                          -> answer <eoss>
    example    context Question: text Answer: answer. <break> image

The score of a candidate is the log-probability of its ids and of <eoss>, which ends the answer.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_cm3leon.evaluation.metrics.image_folder import REPLACE, read_image
from megatron_cm3leon.evaluation.questions.base import Question
from megatron_cm3leon.generation import prompts
from megatron_cm3leon.generation.generator import Generator

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def list_choices(question: Question) -> Question:
    """The question with its candidates as lettered options in its text, and the letters as candidates."""
    if len(question.candidates) > len(LETTERS):
        raise ValueError(f"question {question.key} has {len(question.candidates)} candidates; letters name up to 26.")
    letters = LETTERS[: len(question.candidates)]
    options = " ".join(f"{letter}. {choice}" for letter, choice in zip(letters, question.candidates, strict=True))
    return replace(question, text=f"{question.text.strip()} Options: {options}", candidates=tuple(letters))


def draw_examples(question: Question, examples: Sequence[Question], shots: int, seed: int) -> list[Question]:
    """`shots` of the examples, drawn by the seed and the question's key: the same whatever else is asked.

    Examples of the question's own image are not drawn. ValueError if fewer are left.
    """
    if not shots:
        return []
    eligible = [one for one in examples if one.image is None or one.image != question.image]
    if len(eligible) < shots:
        raise ValueError(
            f"shots ({shots}) must be at most the number of examples of other images than that of question "
            f"{question.key}, {len(eligible)}; lower it or give more examples."
        )
    digest = hashlib.sha256(f"{seed}\0{question.key}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return [eligible[number] for number in random.permutation(len(eligible))[:shots]]


def choose_answer(question: Question) -> str:
    """The answer that an example shows: its true candidate, or the one that most people gave."""
    if question.correct is not None:
        return question.candidates[question.correct]
    if not question.answers:
        raise ValueError(f"the example {question.key} has no answer; give it `answer` or `answers`.")
    return Counter(question.answers).most_common(1)[0][0]


@dataclass
class Answerer:
    """Answers questions with a model and in-context examples."""

    generator: Generator
    examples: Sequence[Question] = ()
    shots: int = 0
    seed: int = 0
    longest: int = 16
    """Text pieces of a free answer, at most."""
    length_normalized: bool = False
    """Whether a candidate's score is divided by the number of its tokens."""
    _documents: dict[str, list[int]] = field(default_factory=dict)
    """Ids of the examples that were used, by their key."""

    def generate(self, questions: Sequence[Question]) -> list[str]:
        """Free answers, greedy, without space around them."""
        images = self._encode_images(questions)
        answers = self.generator.answers(
            [images.get(one.image) for one in questions],
            [one.text for one in questions],
            contexts=[one.context for one in questions],
            retrieved=[self._encode_examples(one) for one in questions],
            longest=self.longest,
        )
        return [answer.strip() for answer in answers]

    def score(self, questions: Sequence[Question]) -> list[np.ndarray]:
        """Scores of the candidates of each question, float64 [candidates]."""
        images = self._encode_images(questions)
        prefixes: list[list[int]] = []
        targets: list[list[int]] = []
        for one in questions:
            codes = images.get(one.image)
            ids = None if codes is None else (codes + self.generator.vocabulary.image_start).tolist()
            prefix = self._build_prompt(one, ids, self._encode_examples(one))
            prefixes += [prefix] * len(one.candidates)
            targets += [self._encode_candidate(candidate) for candidate in one.candidates]
        scores = self.generator.score(prefixes, targets)
        if self.length_normalized:
            scores = scores / np.array([len(target) for target in targets])
        return np.split(scores, np.cumsum([len(one.candidates) for one in questions])[:-1])

    def check_lengths(self, questions: Sequence[Question], *, ranked: bool) -> None:
        """ValueError for a question that does not fit into the context with its examples and its answer."""
        vocabulary, context = self.generator.vocabulary, self.generator.decoder.context
        image = [vocabulary.image_start] * vocabulary.image_tokens
        lengths: dict[str, int] = {}
        for question in questions:
            documents = [[0] * self._measure(one, image, lengths) for one in self._draw(question)]
            prompt = self._build_prompt(question, image if question.image else None, documents)
            answer = self.longest + 1
            if ranked:
                answer = max(len(self._encode_candidate(candidate)) for candidate in question.candidates)
            needed = len(prompt) + answer - 1
            if needed > context:
                raise ValueError(
                    f"question {question.key} with {self.shots} examples and an answer of {answer} tokens needs "
                    f"{needed} positions; the model's context has {context}. Lower --shots"
                    f"{'' if ranked else ' or --longest'}, or remove the question."
                )

    def _measure(self, example: Question, image: list[int], lengths: dict[str, int]) -> int:
        """Tokens of an example."""
        if example.key not in lengths:
            text = self.generator.codec.text.encode(_write_example(example))
            lengths[example.key] = len(text) + (1 + len(image) if example.image else 0)
        return lengths[example.key]

    def _draw(self, question: Question) -> list[Question]:
        return draw_examples(question, self.examples, self.shots, self.seed)

    def _encode_examples(self, question: Question) -> list[list[int]]:
        """Ids of the question's examples; each is encoded once."""
        drawn = self._draw(question)
        for one in drawn:
            if one.key not in self._documents:
                image = [] if one.image is None else [read_image(one.image, REPLACE)]
                self._documents[one.key] = self.generator.codec.encode_document([_write_example(one), *image])
        return [self._documents[one.key] for one in drawn]

    def _encode_images(self, questions: Sequence[Question]) -> dict[Path | None, np.ndarray]:
        """Image codes of the questions' images, each encoded once."""
        paths = list(dict.fromkeys(one.image for one in questions if one.image is not None))
        if not paths:
            return {}
        images = [read_image(path, REPLACE) for path in paths]
        return dict(zip(paths, self.generator.codec.encode_images(images), strict=True))

    def _build_prompt(self, question: Question, image: list[int] | None, documents: list[list[int]]) -> list[int]:
        """The prompt of `Generator.answers`."""
        codec = self.generator.codec
        before, after = prompts.split_answer_template(question.text, question.context)
        left, right = codec.text.encode(before), codec.encode_continuation(after)
        return prompts.infill_text_prompt(left, right, image, documents, self.generator.vocabulary)

    def _encode_candidate(self, candidate: str) -> list[int]:
        """Ids of a candidate in the place of the answer, with <eoss>."""
        text = candidate.strip()
        ids = self.generator.codec.encode_continuation(f" {text}") if text else []
        return [*ids, self.generator.vocabulary.eoss]


def _write_example(example: Question) -> str:
    before, after = prompts.split_answer_template(example.text, example.context)
    return f"{before} {choose_answer(example).strip()}{after}"
