"""The history of a run from metrics.jsonl: attempts, skipped batches, a truncated line."""

import json

import pytest

from megatron_cm3leon.monitoring.history import find_batch, read_history, read_metrics


@pytest.fixture
def run(tmp_path):
    """Steps 1-4, batch 1 skipped; then resumed from step 2, first batch (3) skipped; the last line is truncated."""
    lines = [(1, 1, 0), (1, 1, 1), (1, 2, 2), (1, 3, 3), (1, 4, 4), (2, 2, 3), (2, 3, 4), (2, 4, 5)]
    records = [{"attempt": a, "step": s, "batch": b, "loss": 10 * a + b} for a, s, b in lines]
    text = "\n".join(map(json.dumps, records))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"attempt": 2, "st')
    return tmp_path


def test_the_last_attempt_is_used_and_skipped_batches_are_found(run):
    assert read_history(run) == {
        0: (1, ""),
        1: (1, "non-finite"),
        2: (2, ""),
        3: (2, "non-finite"),
        4: (3, ""),
        5: (4, ""),
    }
    assert [(line["step"], line["loss"]) for line in read_metrics(run)] == [(1, 10), (2, 12), (3, 24), (4, 25)]
    assert find_batch(run, 3) == 4


def test_a_missing_step_or_file_is_an_error(run, tmp_path):
    with pytest.raises(ValueError, match=r"--step \(7\) is not among the steps of .*; it has steps 1 to 4"):
        find_batch(run, 7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"not a run folder: it has no metrics.jsonl"):
        read_metrics(tmp_path / "empty")
