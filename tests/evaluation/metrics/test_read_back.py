"""Error rates of text that was read back, by hand."""

import pytest

from megatron_cm3leon.evaluation.metrics.read_back import count_edits, measure_error_rates, normalize_text


def test_edits_by_hand():
    assert count_edits("kitten", "sitting") == (3, 6, 1, 1)
    assert count_edits("open at nine", "open nine") == (3, 12, 1, 3)
    assert count_edits("a b", "") == (3, 3, 2, 2)
    assert normalize_text(" Ａ  b\n", "ignore") == "a b" and normalize_text("A") == "A"


def test_rates_are_over_all_characters():
    figures = measure_error_rates([("abcd", "abcd"), ("ab", "xxyy")])
    assert figures["character_error_rate"].value == pytest.approx(4 / 6)
    assert figures["word_error_rate"].value == pytest.approx(1 / 2) and figures["read_exactly"].value == 0.5
    with pytest.raises(ValueError, match="expected text of pair 1 is empty"):
        measure_error_rates([("a", "a"), ("", "a")])
