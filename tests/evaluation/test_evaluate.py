"""Evaluation: figures of a tiny model, compared with values computed by hand where possible."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.evaluate import evaluate_model
from megatron_cm3leon.evaluation.heldout import measure_psnr, read_heldout
from megatron_cm3leon.evaluation.judge import (
    compute_accuracy,
    judge_captions,
    load_checker,
    measure_word_f1,
    parse_captions,
)
from megatron_cm3leon.evaluation.loss import build_sequence, measure_loss
from megatron_cm3leon.evaluation.options import EvaluationOptions
from megatron_cm3leon.generation.retrieved import DocumentSource

OPTIONS = {"images": 12, "sweep_images": 6, "guidance": [1.0, 2.0], "examples": 3}


def test_all_figures_are_measured(inputs, monkeypatch):
    source = inputs.source
    monkeypatch.setattr(DocumentSource, "load", classmethod(lambda *_: source))
    out = inputs.path / "out"
    options = EvaluationOptions(**OPTIONS)
    result = evaluate_model(inputs.model, inputs.shards, out, options, checker=inputs.checker, index="index")
    figures = result["figures"]
    assert figures["checker_ceiling"] == {"tone": 1.0, "all": 1.0}
    assert figures["image_psnr_db"] > 40  # levels x 36 against the tokenizer's x 255 / 7
    assert set(figures["heldout_accuracy"]) == {"tone", "all"}
    assert 0 <= figures["caption_accuracy"] <= 1
    assert figures["loss_with_retrieval"] != figures["loss_without_retrieval"]
    parts = [figures[f"loss_parts_{suffix}_retrieval"] for suffix in ("with", "without")]
    assert parts[0]["tokens"] == parts[1]["tokens"] == 12 * 8
    settings = [(row["guidance"], row["retrieval"]) for row in result["sweep"]]
    assert settings == [(1.0, True), (1.0, False), (2.0, True), (2.0, False)]
    best = max(result["sweep"], key=lambda row: sum(row["accuracy"].values()))
    assert (figures["guidance"], figures["retrieval"]) == (best["guidance"], best["retrieval"])
    suffix = "with" if figures["retrieval"] else "without"
    assert figures[f"heldout_accuracy_{suffix}_retrieval"] == figures["heldout_accuracy"]
    assert len(result["examples"]) == len(result["reconstructions"]) == 3
    assert [len(one["neighbours"]) for one in result["retrieval"]] == [2, 2, 2]
    assert all(one["kept_codes"] == one["other_codes"] == 2 for one in result["infilling"])
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    paths = [value for part in ("examples", "reconstructions", "captions", "infilling") for one in result[part]
             for value in one.values() if str(value).endswith(".png")]  # fmt: skip
    assert paths and all((out / path).is_file() for path in paths)


def test_without_a_checker_the_clip_score_decides(inputs, monkeypatch):
    source = inputs.source
    monkeypatch.setattr(DocumentSource, "load", classmethod(lambda *_: source))
    options = EvaluationOptions(**OPTIONS)
    result = evaluate_model(inputs.model, inputs.shards, inputs.path / "out", options, index="index")
    best = max(result["sweep"], key=lambda row: row["clip_score"])
    assert len(result["sweep"]) == 4 and result["figures"]["guidance"] == best["guidance"]
    assert result["figures"]["retrieval"] == best["retrieval"]


def test_evaluation_without_checker_and_index(inputs):
    options = EvaluationOptions(**OPTIONS)
    figures = evaluate_model(inputs.model, inputs.shards, inputs.path / "out", options)["figures"]
    assert "heldout_accuracy" not in figures and figures["loss_with_retrieval"] is None
    assert figures["image_psnr_db"] > 40 and figures["caption_accuracy"] <= 1


def test_heldout_documents_differ_and_their_choice_is_repeatable(inputs):
    corpus = open_shards(inputs.shards)
    pairs = read_heldout(corpus, 18, 0)
    assert len({document.tobytes() + bytes(str(file), "ascii") for document, file in
                zip(pairs.documents, pairs.files, strict=True)}) == 18  # fmt: skip
    assert read_heldout(corpus, 18, 0).captions == pairs.captions
    with pytest.raises(ValueError, match=r"has 0 pairs .* 5 were requested"):
        read_heldout(corpus, 5, 0, checker=load_checker_that_parses_no_caption(inputs))


def load_checker_that_parses_no_caption(inputs):
    path = inputs.path / "nothing.py"
    path.write_text("def classify(image): return {}\ndef parse_caption(text): return None\n")
    return load_checker(path)


def test_the_loss_covers_only_the_query(inputs):
    """Compared with full forward passes, token by token."""
    generator, vocabulary = inputs.generator, inputs.generator.vocabulary
    query, document = [3, 0, 2, vocabulary.break_id, 5, 6, 7, 8], [3, 1, vocabulary.break_id, 9, 9, 9, 9]
    found = measure_loss(generator.decoder, [query, query[:6]], [[document], []], vocabulary)
    sums, counts = {"text": 0.0, "image": 0.0}, {"text": 0, "image": 0}
    for tokens, documents in ((query, [document]), (query[:6], [])):
        ids, start = build_sequence(tokens, documents, vocabulary, 40)
        assert ids[start:] == tokens and ids[0] == vocabulary.eos and len(ids) == len(tokens) + 1 + 8 * len(documents)
        scores = generator.decoder.all_logits(torch.tensor([ids])).log_softmax(-1)[0]
        for position in range(start, len(ids)):
            kind = "image" if 4 <= ids[position] < 12 else "text"
            sums[kind] -= scores[position - 1, ids[position]].item()
            counts[kind] += 1
    assert found["tokens"] == 14
    assert math.isclose(found["loss_text"], sums["text"] / counts["text"], rel_tol=1e-5)
    assert math.isclose(found["loss_image"], sums["image"] / counts["image"], rel_tol=1e-5)
    assert math.isclose(found["loss"], sum(sums.values()) / 14, rel_tol=1e-5)


def test_documents_that_do_not_fit_are_skipped_least_similar_first(inputs):
    vocabulary = inputs.generator.vocabulary
    ids, start = build_sequence([1, 2], [[7] * 20, [8] * 30], vocabulary, 40)
    assert ids == [vocabulary.eos, *[8] * 30, vocabulary.break_id, 1, 2] and start == 32
    with pytest.raises(ValueError, match=r"41 tokens does not fit into the model's context of 40"):
        build_sequence([1] * 41, [], vocabulary, 40)


def test_word_f1():
    assert measure_word_f1("a red circle", "A circle, red") == 1
    assert measure_word_f1("a a red", "a blue") == pytest.approx(2 / 5)
    assert measure_word_f1("", "a") == measure_word_f1("x", "y") == 0


def test_psnr_of_gray_images():
    black, gray = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert math.isclose(measure_psnr(black, gray), 20 * math.log10(5), rel_tol=1e-9)
    assert measure_psnr(gray, gray) == 100.0


def test_accuracy_is_per_attribute_and_of_all(inputs):
    checker = load_checker(inputs.checker)
    expected = [{"tone": "dark"}, {"tone": "light"}, {"tone": "light"}]
    judged = judge_captions(checker, ["a dark picture", "dark", "dark light"], expected)
    assert [one["tone"] for one in judged] == [["dark", "dark", True], ["light", "dark", False], ["light", None, False]]
    assert compute_accuracy(judged) == {"tone": 1 / 3, "all": 1 / 3}
    with pytest.raises(ValueError, match="nothing to judge"):
        compute_accuracy([])


def test_invalid_checkers_are_refused(inputs):
    with pytest.raises(ValueError, match=r"no checker at .*missing.py"):
        load_checker(inputs.path / "missing.py")
    (inputs.path / "half.py").write_text("def classify(image): return {}")
    with pytest.raises(ValueError, match=r"half.py has no function parse_caption"):
        load_checker(inputs.path / "half.py")
    (inputs.path / "half.py").rename(inputs.path / "half.txt")
    with pytest.raises(ValueError, match=r"half.txt is not a Python file; its name must end with .py"):
        load_checker(inputs.path / "half.txt")
    with pytest.raises(ValueError, match=r"the checker does not understand the caption 'a picture'"):
        parse_captions(load_checker(inputs.checker), ["a dark picture", "a picture"])
    (inputs.path / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(ValueError, match=r"broken.py cannot be loaded: ModuleNotFoundError"):
        load_checker(inputs.path / "broken.py")


def test_the_most_similar_retrieved_document_is_last(inputs):
    source = inputs.source
    assert source.find(3, texts=["a", "b"]) == [[2, 1, 0], [2, 1, 0]]
    assert np.array_equal(source.read([[1]])[0][0], open_shards(inputs.bank).read(1))
    with pytest.raises(ValueError, match=r"documents \(0\) must be at least 1"):
        source.find(0, texts=["a"])
