"""tokenizer.json gives the ids of text.model for any text."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from megatron_cm3leon.export.tokenizer_json import PROBES, compare_ids, read_lines, write_tokenizer
from megatron_cm3leon.tokenizers.text import TextTokenizer, train_text
from tests.checkpoint.builders import CAPTIONS
from tests.data.corpora import make_vocabulary


def write(folder, text, **changes):
    vocabulary = make_vocabulary(text=text.size, image=8, sentinels=3, specials=12, **changes)
    assert write_tokenizer(folder, text, vocabulary, context=64) == ""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), vocabulary


def train_with_options(vocab_size=320, **options):
    """A model with options that train_text does not have."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["<break>"] * 50 + CAPTIONS), model_writer=writer, vocab_size=vocab_size,
        byte_fallback=True, bos_id=-1, eos_id=-1, pad_id=-1, minloglevel=2, **options,
    )  # fmt: skip
    return TextTokenizer(writer.getvalue())


def draw_lines(alphabet, count, length, seed):
    draws = random.Random(seed)
    return ["".join(draws.choices(alphabet, k=draws.randrange(length))) for _ in range(count)]


def test_ids_are_those_of_sentencepiece(tmp_path):
    text = train_text(CAPTIONS + draw_lines("ab ", 300, 40, seed=1), 420)
    found, _ = write(tmp_path, text)
    lines = [*PROBES, *CAPTIONS, "\n".join(CAPTIONS) * 20]
    lines += draw_lines("ab ", 2000, 60, seed=2)  # few different characters: many possible merges
    lines += draw_lines("aab  \t\n1▁<>é\u0301🙂漢", 1000, 60, seed=3)
    lines += ["".join(map(chr, random.Random(4).sample(range(0xD800), 50))) for _ in range(20)]
    for line in lines:
        assert found.encode(line).ids == text.encode(line), line
        assert found.decode(text.encode(line), skip_special_tokens=False) == line


def test_stock_transformers_reads_it_and_text_never_becomes_special_tokens(tmp_path):
    text = train_text(CAPTIONS, 330)
    _, vocabulary = write(tmp_path, text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert (stock.eos_token_id, stock.pad_token_id, len(stock)) == (vocabulary.eos, vocabulary.pad, vocabulary.size)
    for line in PROBES:
        assert stock(line)["input_ids"] == text.encode(line), line
    names = stock.convert_ids_to_tokens(range(vocabulary.image_start, vocabulary.size))
    assert names[:9] == [*(f"<image:{code}>" for code in range(8)), "<pad>"]
    assert names[9:] == ["</s>", "<break>", "<eoss>", *(f"<sentinel:{n}>" for n in range(3)), *RESERVED]


RESERVED = [f"<reserved:{number}>" for number in range(5)]


def test_a_piece_may_have_the_name_of_a_special_token(tmp_path):
    text = train_with_options(model_type="bpe", split_by_unicode_script=False, normalization_rule_name="identity",
                              add_dummy_prefix=False, remove_extra_whitespaces=False)  # fmt: skip
    pieces = [text.processor.id_to_piece(number) for number in range(text.size)]
    assert "<break>" in pieces
    found, vocabulary = write(tmp_path, text)
    assert found.id_to_token(vocabulary.break_id) == "<<break>>"
    assert found.encode("a <break>").ids == text.encode("a <break>")


def test_a_model_other_than_bpe_has_no_tokenizer_json(tmp_path):
    text = train_with_options(290, model_type="unigram")
    assert "not a BPE model" in write_tokenizer(tmp_path, text, make_vocabulary(text=text.size), 64)
    assert not list(tmp_path.iterdir())


def test_the_first_differing_line_is_named(tmp_path):
    write(tmp_path, train_text(CAPTIONS, 330))
    other = train_text(CAPTIONS, 320)
    lines = tmp_path / "corpus.txt"
    lines.write_text("?\n?\na small red circle, in the centre\n")
    with pytest.raises(ValueError, match=r"differs from text.model on line 3 of corpus: 'a small red"):
        compare_ids(tmp_path, other, read_lines(lines), "corpus")


def test_unreadable_corpora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list(read_lines(tmp_path / "absent"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        list(read_lines(tmp_path / "latin.txt"))
    (tmp_path / "ends.txt").write_bytes(b" a\r\n\nb")
    assert list(read_lines(tmp_path / "ends.txt")) == [" a\r", "", "b"]
