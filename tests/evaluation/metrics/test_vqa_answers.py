"""Accuracy of answers by VQA's official rules: every rule and every exception, computed by hand."""

import pytest

from megatron_cm3leon.evaluation.metrics.vqa_answers import (
    build_stemmer,
    match_any,
    measure_accuracy,
    normalize_answer,
    read_letter,
)

RULES = [
    (" red\n\tcar ", "red car"),
    ("A red, The blue", "red blue"),  # a comma beside a space is deleted; articles go
    ("red-blue", "red blue"),  # a mark between letters becomes a space
    ("red- blue-green", "red bluegreen"),  # beside a space once: deleted everywhere
    ("1,000 red-blue", "1000 redblue"),  # a comma in a number: all marks are deleted
    ("what?", "what"),
    ("it's 5:30", "it's 5:30"),  # apostrophe and colon are not punctuation
    ("3.5", "3.5"),
    ("5.", "5"),  # the look-behind that is missing: only a following digit keeps a period
    ("U.S.A.", "usa"),
    ("." * 40, "." * 8),  # 32 periods at most
    ("none", "0"),
    ("Ten", "10"),
    ("twenty", "twenty"),
    ("dont", "don't"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),  # without both apostrophes it is in no table
    ("Im", "im"),  # the table has "Im", which lower-cased text is not
    ("somebody'd", "somebodyd"),
    ("yall'd've", "y'all'd've"),
    ("theyre", "they're"),
    ("the a an", ""),
]


@pytest.mark.parametrize(("answer", "expected"), RULES)
def test_normalization(answer, expected):
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize(
    ("matches", "expected"),
    # k of ten match: k sets without one of them have k - 1 matches, the others k.
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)],
)
def test_accuracy_is_the_mean_over_the_sets_without_one_answer(matches, expected):
    answers = ["red"] * matches + [f"x{number}" for number in range(10 - matches)]
    assert measure_accuracy("Red.", answers) == pytest.approx(expected)


def test_answers_that_all_agree_are_compared_as_they_are():
    assert measure_accuracy("Black.", ["black"] * 10) == 0
    assert measure_accuracy("Black.", ["black"] * 10, "always") == 1
    assert measure_accuracy(" black\n", ["black"] * 10) == 1
    assert measure_accuracy("Black.", ["black"] * 9 + ["Black"]) == 1  # they differ before the normalization


def test_stems_are_compared_on_both_sides():
    stem = build_stemmer()
    answers = ["race car"] * 9 + ["car"]
    assert measure_accuracy("racing cars", answers) == 0
    assert measure_accuracy("racing cars", answers, stem=stem) == 1
    assert measure_accuracy("racing cars", ["race car"] * 10, stem=stem) == 1


def test_any_of_few_answers():
    assert match_any("Red!", ["blue", "red"]) == 1 and match_any("green", ["blue", "red"]) == 0
    assert match_any("Red", ["red"]) == 0 and match_any("Red", ["red"], "always") == 1


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("A", 0),
        (" B. ", 1),
        ("C. a red one", 2),
        ("D", None),
        ("a", None),
        ("A red one", None),
        ("(A)", None),
        ("", None),
    ],
)
def test_letters(answer, number):
    assert read_letter(answer, 3) == number


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="3 human answers are too few for VQA's accuracy, which needs at least 4"):
        measure_accuracy("red", ["red"] * 3)
    with pytest.raises(ValueError, match="normalizer \\('own'\\) must be one of: official, always"):
        measure_accuracy("red", ["red"] * 10, "own")
