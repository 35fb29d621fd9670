"""The benchmark's comparison of ids, including a document that contains SentencePiece's space marker."""

import json

import numpy as np
import pytest

from benchmarks.preprocess import check_same_ids, run_megatron
from megatron_cm3leon.data.preprocess.run import PreprocessOptions, preprocess
from megatron_cm3leon.data.sources import open_source
from tests.checkpoint.builders import CAPTIONS, write_tokenizers


def test_ids_are_compared_by_document(tmp_path):
    vocabulary = write_tokenizers(tmp_path / "tok")
    (tmp_path / "text.model").write_bytes((tmp_path / "tok/text.model").read_bytes())
    path = tmp_path / "texts.jsonl"
    texts = [*CAPTIONS[:3], "a \u2581mark\u2581 for spaces", CAPTIONS[3]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run_megatron(path, tmp_path / "text.model", tmp_path / "megatron", 1)
    preprocess(open_source(path, 2), PreprocessOptions(tokenizer=tmp_path / "tok", output=tmp_path / "ours"))
    check_same_ids(tmp_path, path)
    assert vocabulary.dtype == np.uint16
    ids = np.fromfile(tmp_path / "megatron.bin", np.uint16)
    ids[0] += 1
    ids.tofile(tmp_path / "megatron.bin")
    with pytest.raises(AssertionError, match=r"the ids of document 0 of .* differ from SentencePiece's"):
        check_same_ids(tmp_path, path)
