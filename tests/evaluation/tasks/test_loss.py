"""The task loss: figures computed by hand, the same tokens with any number of documents, continuing, bad input."""

import json

import numpy as np
import pytest

from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.loss import build_sequence
from megatron_cm3leon.evaluation.result import read_result
from megatron_cm3leon.evaluation.tasks import loss
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.retrieved import DocumentSource
from tests.evaluation.conftest import WORDS
from tests.evaluation.conftest import inputs as inputs
from tests.generation.test_scoring import score_plainly
from tests.tools.call import call_tool


@pytest.fixture
def index(inputs, monkeypatch):
    """A folder that is described as an index; its retriever is a fake."""
    monkeypatch.setattr(DocumentSource, "load", classmethod(lambda *_: inputs.source))
    folder = inputs.path / "index"
    folder.mkdir()
    (folder / "index.json").write_text("{}")
    return folder


def sum_plainly(inputs, k):
    """(nats, units) of text pieces, breaks and image codes over all documents, from single forward passes."""
    generator, vocabulary, corpus = inputs.generator, inputs.generator.vocabulary, open_shards(inputs.shards)
    bank, nats, n_bytes = open_shards(inputs.bank), np.zeros(3), 0
    for number in range(corpus.documents):
        query = corpus.read(number).astype(int).tolist()
        documents = [
            bank.read(place) for place in (1, 0)[2 - k :]
        ]  # FakeRetriever finds 0, 1, ...; the nearest is last
        ids, start = build_sequence(query, documents, vocabulary, 40)
        for place in range(start, len(ids)):
            kind = 2 if 4 <= ids[place] < 12 else int(ids[place] == vocabulary.break_id)
            nats[kind] -= score_plainly(generator.decoder, ids[:place], [ids[place]])
        n_bytes += len(" ".join(WORDS[token] for token in query[:3]))
    return nats, n_bytes


def test_figures_are_sums_over_the_same_tokens_with_any_number_of_documents(inputs, index):
    out = inputs.path / "out"
    command = ["--model", inputs.model, "--shards", inputs.shards, "--index", index, "--documents", 0, 1]
    done = call_tool("evaluate", "loss", *command, "--output", out)
    assert done.returncode == 0, done.stderr
    result = read_result(out / "loss.json")
    totals = {}
    for k in (0, 1):
        (text, pause, image), n_bytes = sum_plainly(inputs, k)
        expected = {
            "loss": (text + pause + image) / (20 * 8),
            "loss_text": (text + pause) / (20 * 4),
            "loss_image": image / (20 * 4),
            "text_per_byte": text / n_bytes,
            "image_per_pixel": image / (20 * 2 * 2),
        }
        for name, value in expected.items():
            figure = result.figures[f"{name}_documents_{k}"]
            assert figure.value == pytest.approx(value, rel=1e-5) and figure.low < figure.value < figure.high
            assert figure.n == 20
        totals[k] = text + pause + image
    change = result.figures["loss_change_documents_1"]
    assert change.value == pytest.approx((totals[1] - totals[0]) / 160, abs=1e-5) and change.value != 0
    assert result.tables["tokens"] == {"text": 60, "break": 20, "image": 80}
    assert set(result.inputs) == {"model", "shards", "index"} and not result.notes
    assert "text_per_byte_documents_0: " in done.stdout and f"wrote {out / 'loss.json'}" in done.stdout


def test_documents_that_do_not_fit_are_reported(inputs, index):
    """Of a context of 40 a query takes 7, `</s>` 1 and each retrieved document 9: three fit."""
    result = loss.evaluate(
        output=inputs.path / "out", model=inputs.model, shards=inputs.shards, index=index, documents=[5]
    )
    assert result.notes == [
        "20 of 20 documents had fewer than 5 retrieved documents in context, on average 3.00: the others did not fit, "
        "or were not found."
    ]


def test_an_interrupted_measurement_continues(inputs, monkeypatch):
    monkeypatch.setattr(loss, "AT_ONCE", 4)
    options = {"model": inputs.model, "shards": inputs.shards, "count": 12, "seed": 3}
    complete = loss.evaluate(output=inputs.path / "complete", **options)
    calls, states = [], Decoder.states

    def interrupt(self, ids):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return states(self, ids)

    monkeypatch.setattr(Decoder, "states", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss.evaluate(output=inputs.path / "out", **options)
    continued = loss.evaluate(output=inputs.path / "out", **options)
    assert continued == complete and calls == [4, 4, 4, 4]
    with pytest.raises(ValueError, match="of a run with another seed; give another --output"):
        loss.evaluate(output=inputs.path / "out", **options | {"seed": 4})


def test_bad_input_is_one_sentence(inputs, index):
    def refuse(*arguments):
        done = call_tool("evaluate", "loss", "--model", inputs.model, "--output", inputs.path / "bad", *arguments)
        assert done.returncode == 2 and not (inputs.path / "bad" / "loss.json").exists()
        return done.stderr

    shards = ["--shards", inputs.shards]
    assert "error: documents (2) above 0 requires an index" in refuse(*shards, "--documents", 0, 2)
    assert "error: documents (-1) must be one or more numbers of 0 or above" in refuse(*shards, "--documents", "-1")
    assert "error: count (0) must be at least 1" in refuse(*shards, "--count", 0)
    assert "error: no shards at" in refuse("--shards", inputs.path / "none")
    bank = ["--shards", inputs.bank, "--index", index, "--documents", 1]
    assert "each document would retrieve itself; give held-out shards" in refuse(*bank)
    manifest = json.loads((inputs.shards / "manifest.json").read_text())
    manifest["vocabulary"]["text_sha256"] = "2" * 64
    del manifest["vocabulary"]["hash"], manifest["sha256"]
    (inputs.shards / "manifest.json").write_text(json.dumps(manifest))
    assert "was made with another vocabulary" in refuse(*shards)
