"""The task infill: what is hidden, what counts as right, the figures of pairs by hand, continuing, bad input."""

import threading

import numpy as np
import pytest

from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.heldout import read_heldout
from megatron_cm3leon.evaluation.judge import load_checker
from megatron_cm3leon.evaluation.result import read_result
from megatron_cm3leon.evaluation.tasks import infill
from megatron_cm3leon.generation.retrieved import DocumentSource
from tests.evaluation.rank_threads import run_ranks
from tests.models import WordTokenizer
from tests.tools.call import call_tool


def sum_generated(subject):
    """Share of codes in the boxes that greedy decoding draws, one code after another, from plain forward passes."""
    generator, vocabulary = subject.generator, subject.generator.vocabulary
    pairs, shares = read_heldout(open_shards(subject.shards), 192, 0), []
    for number, (caption, codes) in enumerate(zip(pairs.captions, pairs.codes, strict=True)):
        top, left, bottom, right = infill.place_boxes(2, 2)[number % 5]
        inside = [row * 2 + column for row in range(top, bottom) for column in range(left, right)]
        ids = [vocabulary.eos]
        for place in (1, 0):  # FakeRetriever finds 0, 1, ...; the nearest is last
            ids += [*subject.source.bank.read(place).tolist(), vocabulary.break_id]
        ids += [*generator.codec.text.encode(caption), vocabulary.break_id]
        for place, code in enumerate(codes.tolist()):
            if place in inside:
                candidates = [[token] for token in range(vocabulary.image_start, vocabulary.image_end)]
                drawn = int(generator.score([ids] * len(candidates), candidates).argmax())
                shares.append(drawn == code)
                code = drawn
            ids.append(vocabulary.image_start + code)
    return np.mean(shares)


@pytest.fixture
def subject(inputs, monkeypatch):
    """The inputs, with a text tokenizer that continues a sentence as its first word."""
    encode = WordTokenizer.encode
    monkeypatch.setattr(WordTokenizer, "encode", lambda self, text: encode(self, text.removeprefix("x")))
    return inputs


def test_boxes_are_the_corners_and_the_center():
    assert infill.place_boxes(8, 8) == [(0, 0, 4, 4), (0, 4, 4, 8), (2, 2, 6, 6), (4, 0, 8, 4), (4, 4, 8, 8)]
    assert infill.place_boxes(1, 2) == [(0, 0, 1, 1), (0, 1, 1, 2), (0, 0, 1, 1), (0, 0, 1, 1), (0, 1, 1, 2)]


def test_words_that_the_checker_needs_are_hidden(inputs):
    checker, caption = load_checker(inputs.checker), "a light picture"
    seen = set()
    for seed in range(40):
        (start, end), span = infill.choose_words(caption, checker, np.random.default_rng(seed))
        assert caption[start:end] == "light"
        seen.add(caption[slice(*span)])
    assert seen == {"a light", "light picture", "a light picture"}
    words = {infill.choose_words(caption, None, np.random.default_rng(seed))[0] for seed in range(40)}
    assert {caption[slice(*word)] for word in words} == {"a", "light", "picture"}
    assert infill.choose_words("?!", None, np.random.default_rng(0)) is None


def test_figures_by_hand():
    def item(word, right, codes, background, correct, without):
        return {
            "word": {"hidden": word, "right": right},
            "span": {"right": False},
            "box": {"codes": codes, "codes_background": background, "codes_generated": 1.0, "all": correct,
                    "all_background": without, "all_generated": True, "all_original": True},
        }  # fmt: skip

    items = [
        item("red", True, 1.0, 0.5, True, False),
        item("red", False, 0.5, 0.5, True, True),
        item("blue", True, 0.5, 0.0, False, False),
        item("big", True, 0.0, 0.0, True, True),
    ]
    figures = {name: figure.value for name, figure in infill.compute_figures(items, 0).items()}
    assert figures == {
        "text_word": 0.75, "text_word_commonest": 0.5, "text_span": 0,
        "box_codes": 0.5, "box_codes_background": 0.25, "box_codes_generated": 1,
        "box_all": 0.75, "box_all_background": 0.5, "box_all_generated": 1, "box_all_original": 1,
        "box_hidden": 0.5, "box_hidden_generated": 1,
    }  # fmt: skip


def test_pairs_are_filled_and_compared(subject, monkeypatch):
    """A generator that returns the original of every second pair, and nothing or zeros for the others."""
    generator, out = subject.generator, subject.path / "out"
    calls = []

    def fill_text(texts, images, retrieved):
        calls.append(retrieved)
        rows = [("light" if codes.min() > 3 else "dark", before, after) for codes, (before, after) in
                zip(images, texts, strict=True)]  # fmt: skip
        return [f"a {tone} picture" if tone == "light" else before + after for tone, before, after in rows]

    monkeypatch.setattr(generator, "infill_text", fill_text)
    monkeypatch.setattr(DocumentSource, "load", classmethod(lambda *_: subject.source))
    (subject.path / "index").mkdir()
    (subject.path / "index" / "index.json").write_text("{}")
    command = ["--model", subject.model, "--shards", subject.shards, "--checker", subject.checker, "--output", out]
    done = call_tool("evaluate", "infill", *command, "--index", subject.path / "index", "--temperature", 0)
    assert done.returncode == 0, done.stderr
    result = read_result(out / "infill.json")
    assert result.figures["text_word"].value == result.figures["text_span"].value == 0.5
    expected = sum_generated(subject)
    assert result.figures["box_codes_generated"].value == pytest.approx(expected)
    assert result.figures["text_word"].n == 20 and result.figures["box_all_original"].value == 1
    assert 0 <= result.figures["box_codes"].value <= 1 and result.figures["box_codes_background"].value < 1
    texts = {row["text"]: row for row in result.tables["texts"]}
    assert texts["a <mask> picture"]["hidden"] in ("dark", "light")
    assert all(len(documents) == 2 for documents in calls[0]), "two in training"
    assert result.settings["documents"] == 2 and set(result.inputs) == {"model", "shards", "checker", "index"}


def test_an_interrupted_evaluation_continues(subject, monkeypatch):
    options = {"model": subject.model, "shards": subject.shards, "count": 10, "temperature": 0.0, "batch_size": 4}
    complete = infill.evaluate(output=subject.path / "complete", **options)
    generator, calls = subject.generator, []
    fill = generator.infill_text

    def interrupt(texts, **rest):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fill(texts, **rest)

    monkeypatch.setattr(generator, "infill_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        infill.evaluate(output=subject.path / "out", **options)
    assert infill.evaluate(output=subject.path / "out", **options) == complete and calls == [8, 8, 8, 4]
    assert "box_all" not in complete.figures, "no checker"
    with pytest.raises(ValueError, match="of a run with different settings; give another --output"):
        infill.evaluate(output=subject.path / "out", **options | {"count": 9})
    with pytest.raises(ValueError, match=r"--batch-size \(0\) must be at least 1"):
        infill.evaluate(output=subject.path / "out", **options | {"batch_size": 0})
    with pytest.raises(ValueError, match=r"--documents \(2\) requires an index to retrieve from; give --index"):
        infill.evaluate(output=subject.path / "out", **options | {"documents": 2})
    with pytest.raises(ValueError, match=r"--count \(0\) must be at least 1"):
        infill.evaluate(output=subject.path / "out", **options | {"count": 0})


def test_ranks_share_the_pairs_and_may_become_fewer(subject, monkeypatch):
    options = {"model": subject.model, "shards": subject.shards, "checker": subject.checker, "count": 10}
    options |= {"batch_size": 3, "output": subject.path / "out"}
    alone = infill.evaluate(**options | {"output": subject.path / "alone"})
    generator, batches = subject.generator, []
    fill, local = generator.infill_text, threading.local()

    def interrupt_second(texts, **rest):
        batches.append(len(texts) // 2)
        local.calls = getattr(local, "calls", 0) + 1
        if local.calls == 2:
            raise KeyboardInterrupt
        return fill(texts, **rest)

    monkeypatch.setattr(generator, "infill_text", interrupt_second)
    with pytest.raises(KeyboardInterrupt):  # of the first rank; the others have one batch each
        run_ranks(3, lambda ranks: infill.evaluate(ranks=ranks, **options))
    assert sorted(batches) == [1, 3, 3, 3]
    batches.clear()
    assert run_ranks(2, lambda ranks: infill.evaluate(ranks=ranks, **options)) == [alone, None]
    assert batches == [1]
