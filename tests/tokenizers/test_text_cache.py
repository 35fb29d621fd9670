"""The ids of a text, joined from cached words, are those of the tokenizer."""

import random

import numpy as np
import pytest
import sentencepiece

from megatron_cm3leon.tokenizers import text_cache
from megatron_cm3leon.tokenizers.text import TextTokenizer, train_text
from megatron_cm3leon.tokenizers.text_cache import TextEncoder, is_divisible

TEXTS = [f"a {size}  cat, 3 dogs (and {n} birds) don't mind.\n  Indented" for n in range(9) for size in ("big", "tiny")]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_text(TEXTS, 350)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_ids_joined_from_words_are_those_of_the_tokenizer(tokenizer, dtype):
    encoder = TextEncoder(tokenizer, dtype)
    assert encoder.divides
    draws = random.Random(0)
    letters = [*"abcdog ,.'(\n\t", "  ", "   ", " the ", "▁", "é", "漢", "🙂", "\x00", "cat", "birds", "</s>"]
    for _ in range(3000):
        text = "".join(draws.choice(letters) for _ in range(draws.randrange(24)))
        ids = np.frombuffer(encoder.encode(text), encoder.dtype)
        assert ids.tolist() == tokenizer.encode(text), repr(text)


def test_a_full_cache_is_cleared(tokenizer, monkeypatch):
    monkeypatch.setattr(text_cache, "MAX_WORDS", 10)
    encoder = TextEncoder(tokenizer, np.uint16)
    for number in range(100):
        text = f"w{number} {'long' * 30} x{number}"
        assert np.frombuffer(encoder.encode(text), np.uint16).tolist() == tokenizer.encode(text)
        assert len(encoder._words) <= 10 and not any(len(word) > text_cache.MAX_CHARACTERS for word in encoder._words)


def test_texts_are_not_divided_if_pieces_cross_words(tmp_path):
    """A piece such as 'a▁b' would be lost; texts of unigram and normalizing models are not divided either."""
    settings = {
        "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "unk_id": 0, "bos_id": -1, "eos_id": -1, "pad_id": -1,
        "hard_vocab_limit": False, "minloglevel": 2, "model_type": "bpe", "vocab_size": 330,
    }  # fmt: skip
    for name, change, divides in (
        ("plain", {}, True),
        ("crossing", {"split_by_whitespace": False}, False),
        ("unigram", {"model_type": "unigram"}, False),
        ("normalizing", {"normalization_rule_name": "nmt_nfkc"}, False),
        ("prefix", {"add_dummy_prefix": True}, False),
        ("suffix", {"treat_whitespace_as_suffix": True}, False),
        ("symbols", {"user_defined_symbols": ["t, 3"]}, False),
    ):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 5), model_prefix=str(tmp_path / name), **{**settings, **change}
        )
        tokenizer = TextTokenizer.load(tmp_path / f"{name}.model")
        assert is_divisible(tokenizer) is divides, name
        text = "a tiny  cat, 3 dogs (and 4 birds)"
        assert np.frombuffer(TextEncoder(tokenizer, np.uint16).encode(text), np.uint16).tolist() == tokenizer.encode(
            text
        )


@pytest.mark.parametrize("limit", [text_cache.MAX_WORDS, 12])
def test_many_texts_at_once_equal_texts_one_by_one(tokenizer, monkeypatch, limit):
    monkeypatch.setattr(text_cache, "MAX_WORDS", limit)
    draws = random.Random(1)
    letters = [*"abcdog ,.'(\n\t", "  ", " the ", "▁", "é", "🙂", "\x00", "cat", "long" * 20]
    one, many = (TextEncoder(tokenizer, np.uint16) for _ in range(2))
    assert many.encode_many([]) == []
    for _ in range(300):
        texts = [
            "".join(draws.choice(letters) for _ in range(draws.randrange(12))) for _ in range(draws.randrange(1, 9))
        ]
        assert many.encode_many(texts) == list(map(one.encode, texts)), texts
        assert len(many._words) <= limit
