"""METEOR and SPICE: METEOR against the jar's own scores, and what is reported if something is missing."""

import subprocess

import numpy as np
import pytest

from megatron_cm3leon.evaluation.metrics import java_captions
from megatron_cm3leon.evaluation.metrics.java_captions import (
    align_meteor,
    compute_spice,
    explain_missing,
    find_java,
    score_meteor,
    tokenize_with_java,
)

# Counts in the form of meteor-1.5.jar, and what its command EVAL printed for each row and for all of them together.
COUNTS = [
    [4, 3, 1, 1, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 3, 3],
    [7, 6, 4, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 4, 5, 4],
    [3, 3, 1, 1, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 3],
    [9, 8, 3, 2, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 2, 1, 0, 1, 3, 6, 6],
    [5, 5, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
]
SCORES = [0.4197512445337911, 0.3029325750407132, 1.0, 0.2553396355645646, 0.0]
CORPUS_SCORE = 0.26405927334755197


def test_meteor_of_counts_equals_the_jar():
    counts = np.array(COUNTS, float)
    assert [score_meteor(row[None]) for row in counts] == pytest.approx(SCORES, abs=1e-12)
    assert score_meteor(counts) == pytest.approx(CORPUS_SCORE, abs=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(bool(explain_missing("meteor")), reason=str(explain_missing("meteor")))
def test_meteor_equals_pycocoevalcap():
    meteor = pytest.importorskip("pycocoevalcap.meteor.meteor").Meteor()
    captions = ["a red circle", "a cat sits on the mat", "dogs run in the park", "x y z", "a big wave"]
    references = [["a circle that is red"], ["the cat on the mat is sitting", "a cat"], ["a puppy plays outside"]]
    references += [["nothing in common"], ["a big wave", "a large wave"]]
    joined = {number: list(group) for number, group in enumerate(references)}
    expected, per_caption = meteor.compute_score(joined, {number: [text] for number, text in enumerate(captions)})
    tokens = [text.split() for text in captions]
    counts = align_meteor(tokens, [[text.split() for text in group] for group in references])
    assert score_meteor(counts) == pytest.approx(expected, abs=1e-6)
    assert [score_meteor(row[None]) for row in counts] == pytest.approx(per_caption, abs=1e-6)


@pytest.mark.skipif(bool(explain_missing("spice")), reason=str(explain_missing("spice")))
def test_spice_of_an_identical_caption_is_1():
    scores = compute_spice([["a", "red", "circle"], ["a", "dog"]], [[["a", "red", "circle"]], [["the", "sea"]]])
    assert scores.tolist() == [1.0, 0.0]


def test_without_java(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    monkeypatch.setenv("PATH", str(tmp_path))
    find_java.cache_clear()
    assert "Java is not on PATH; install a Java runtime" in explain_missing("meteor")
    (tmp_path / "java").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    find_java.cache_clear()
    assert "java -version fails with status 3" in explain_missing("meteor")
    find_java.cache_clear()


@pytest.mark.skipif(bool(explain_missing("tokenizer")), reason=str(explain_missing("tokenizer")))
def test_files_that_are_missing_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(java_captions, "find_package", lambda: tmp_path)
    reason = explain_missing("spice")
    assert "stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar" in reason and str(tmp_path) in reason
    assert "paraphrase-en.gz" in explain_missing("meteor")
    for name in ("tokenizer", "spice", "meteor"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer" / "stanford-corenlp-3.4.1.jar").write_bytes(b"truncated")
    with pytest.raises(ValueError, match=r"stanford-corenlp-3.4.1.jar failed with status 1: Error: Could not find"):
        tokenize_with_java(["a"])
    (tmp_path / "meteor" / "meteor-1.5.jar").write_bytes(b"truncated")
    with pytest.raises(ValueError, match=r"METEOR's jar scored 0 of 1 captions and stopped: Error: Invalid or corrupt"):
        align_meteor([["a"]], [[["a"]]])


@pytest.mark.skipif(bool(explain_missing("tokenizer")), reason="needs Java and pycocoevalcap")
@pytest.mark.skipif(not explain_missing("spice"), reason="SPICE's files are here")
def test_spice_without_its_jars_ends_in_one_sentence():
    with pytest.raises(ValueError, match=r"spice-1.0.jar failed with status 1: .*NoClassDefFoundError"):
        compute_spice([["a"]], [[["a"]]])


def test_java_reports_its_version():
    if reason := explain_missing("tokenizer"):
        pytest.skip(reason)
    printed = subprocess.run([find_java(), "-version"], capture_output=True, text=True).stderr
    assert java_captions.read_java_version() in printed
