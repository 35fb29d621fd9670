"""Reasons why inputs were not used: counts, the first of each kind, and a hint."""

import pytest

from megatron_cm3leon.data.preprocess.reasons import Reasons
from tests.data.runs import run
from tests.data.sources.test_fields import write_lines


def test_the_most_common_reasons_come_first_with_a_shortened_example():
    reasons = Reasons()
    assert not reasons and reasons.hint == ""
    for reason in ("c: 1", "a", "b: " + "x" * 900, "b: y", "d: z", "b", "e"):
        reasons.add(reason)
    assert reasons.total == 7 and reasons.hint == ""
    b, *rest = str(reasons).split("; ")
    assert b.startswith("3 x b (the first: xxx") and len(b) < 280
    assert rest == ["1 x c (the first: 1)", "1 x a", "and 2 other reasons"]


def test_an_error_contains_the_reasons_and_a_hint(tmp_path):
    rows = [{"filepath": f"{n}.jpg", "title": "t"} for n in range(3)] + [{"image": "none.png", "caption": "c"}]
    with pytest.raises(ValueError) as error:
        run(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert (
        'max-bad-fraction 0 allows: 3 x field "image" is missing (the first: the fields are filepath, title); 1 x '
        "missing picture (the first: none.png). If image and caption have other names, give --image-field and --caption"
    ) in str(error.value)
