"""Accuracy of answers to questions about images, by the rules of VQA's official script with all its exceptions.

Source of the rules: `vqaEval.py` of github.com/GT-Vision-Lab/VQA (v2.0, commit a013f00). Two modes:

    official   answers are normalized only where the human answers of the question differ; otherwise the strings are
               compared as they are: "Black." is not "black". What VQA's leaderboard computes.
    always     answers are always normalized, as lmms-eval does since its pull request 794; its accuracies are higher

VizWiz and OK-VQA use the same formula over ten answers.
"""

import re
from collections.abc import Callable, Sequence

MODES = ("official", "always")
FEWEST_ANSWERS = 4
"""With fewer human answers the official accuracy cannot reach 1: it needs three others that agree."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""In the order of the official script. Apostrophe, colon and period are not among them."""
_PERIOD = re.compile(r"\.(?!\d)")
"""The official expression begins with `(?!<=\\d)`, a look-ahead for the text "<=" where a look-behind was meant: it
excludes nothing, so that the period of "5." is removed like any other."""
_MOST_PERIODS = 32
"""Periods that are removed, at most: the official script passes the flag re.UNICODE (32) as the count."""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTIONS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
"""Written without any apostrophe they are given it back."""
_DOUBLE_CONTRACTIONS = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
"""Written with one of their two apostrophes they are given the other."""


def _build_contractions() -> dict[str, str]:
    """The official table; its keys with a capital I, which lower-cased text never has, are not in it."""
    table = {full.replace("'", ""): full for full in _CONTRACTIONS.split()}
    for full in _DOUBLE_CONTRACTIONS.split():
        first, second = (match.start() for match in re.finditer("'", full))
        table[full[:first] + full[first + 1 :]] = table[full[:second] + full[second + 1 :]] = full
    table |= {"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
    table |= {"yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}
    return table | {"somebody'd": "somebodyd"}  # the official script has this one the other way round


CONTRACTIONS = _build_contractions()


def strip_answer(answer: str) -> str:
    """The answer on one line, without space around it: what is compared where nothing is normalized."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """Punctuation, digits, articles and contractions of an answer as the official script writes them."""
    return _normalize_words(_remove_punctuation(strip_answer(answer)))


def _remove_punctuation(answer: str) -> str:
    """Marks beside a space are deleted, and all marks of an answer with a comma in a number; others become spaces."""
    joined = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or joined else " ")
    return _PERIOD.sub("", text, count=_MOST_PERIODS)


def _normalize_words(answer: str) -> str:
    words = [_DIGITS.get(word, word) for word in answer.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def build_stemmer() -> Callable[[str], str]:
    """A function that replaces each word of an answer by its Porter stem, for OK-VQA, whose answers are stemmed."""
    from snowballstemmer import stemmer

    porter = stemmer("porter")
    return lambda answer: " ".join(porter.stemWords(answer.split()))


def measure_accuracy(
    prediction: str, answers: Sequence[str], mode: str = "official", stem: Callable[[str], str] | None = None
) -> float:
    """Official accuracy, 0 to 1, of an answer against the human answers.

    It is the mean of min(1, matches / 3) over the sets that leave one human answer out. `stem` is applied to both sides
    after the normalization. ValueError for another mode, and for fewer than four human answers.
    """
    if len(answers) < FEWEST_ANSWERS:
        raise ValueError(
            f"{len(answers)} human answers are too few for VQA's accuracy, which needs at least {FEWEST_ANSWERS}."
        )
    found, *expected = _prepare([prediction, *answers], mode, stem)
    matches = [answer == found for answer in expected]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def match_any(
    prediction: str, answers: Sequence[str], mode: str = "official", stem: Callable[[str], str] | None = None
) -> float:
    """1 if an answer equals any of the expected ones, else 0: for data sets with one or few answers per question."""
    found, *expected = _prepare([prediction, *answers], mode, stem)
    return float(found in expected)


def _prepare(texts: list[str], mode: str, stem: Callable[[str], str] | None) -> list[str]:
    """A prediction and its expected answers in the form in which they are compared."""
    if mode not in MODES:
        raise ValueError(f"normalizer ({mode!r}) must be one of: {', '.join(MODES)}.")
    texts = [strip_answer(text) for text in texts]
    if mode == "always" or len(set(texts[1:])) > 1:
        texts = [normalize_answer(text) for text in texts]
    return texts if stem is None else [stem(text) for text in texts]


def read_letter(prediction: str, choices: int) -> int | None:
    """Number of the choice that an answer names, "A" or "A. ...", as LLaVA reads ScienceQA; None for anything else."""
    found = re.match(r"([A-Z])(\. |\.?$)", prediction.strip())
    if not found:
        return None
    number = ord(found[1]) - ord("A")
    return number if number < choices else None
