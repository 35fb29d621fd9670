"""Boxes as text and back."""

import pytest

from megatron_cm3leon.data.tasks.boxes import BoxedObject, read_objects, write_objects


def test_objects_are_written_with_two_digits_and_read_back():
    objects = [BoxedObject("a cat at rest", (0.0, 0.25, 0.5, 1.0)), BoxedObject("dog", (0.1, 0.2, 0.3, 0.4))]
    text = write_objects(objects)
    assert text == "a cat at rest at 00 25 50 99, dog at 10 20 30 40"
    again = read_objects(text)
    assert [one.name for one in again] == ["a cat at rest", "dog"] and write_objects(again) == text
    for before, after in zip(objects, again, strict=True):
        assert max(abs(a - b) for a, b in zip(before.box, after.box, strict=True)) <= 0.5 / 99 + 1e-9


@pytest.mark.parametrize(
    "text", ["a cat", "cat at 1 2 3 4", "cat at 00 25 50", "cat at 00 25 50 99 dog at 00 00 10 10"]
)
def test_a_text_without_boxes_is_refused(text):
    with pytest.raises(ValueError, match=r"objects \('.*'\) must be written as NAME at LEFT TOP RIGHT BOTTOM"):
        read_objects(text)
