"""Decoding returns the exact text, text never becomes special tokens, and errors explain impossible sizes."""

import random

import pytest

from megatron_cm3leon.tokenizers.text import TextTokenizer, train_text

CAPTIONS = [
    f"a {size} {color} circle in the {position}, on a white background"
    for size in ("small", "large")
    for color in ("red", "green", "blue", "yellow")
    for position in ("centre", "top left corner", "bottom right corner")
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_text(CAPTIONS, 320)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   ",
        "a red circle",
        " leading",
        "trailing ",
        "two  spaces   three",
        "tab\tline\nreturn\r\nend\n",
        "ﬁ Ａ é e\u0301 ½",  # Unicode normal forms would change these
        "漢字 🙂👩‍👩‍👧 \u00a0no-break",
        "▁mark▁▁ in ▁ text",
        "\x00 zero",
        "<0x41> <unk> </s> <break> <pad> <sentinel:0> <eoss>",
    ],
)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < i < tokenizer.size for i in ids)  # 0 is the unknown piece, which is never needed


def test_round_trip_of_random_text(tokenizer):
    draws = random.Random(0)
    for _ in range(300):
        text = "".join(chr(draws.choice([draws.randrange(128), draws.randrange(0xD800), 0x2581])) for _ in range(20))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_exact_ids():
    """With one word repeated, 'aab' is merged, and ids follow the order of the model file."""
    tokenizer = train_text(["aab aab"] * 4, 263)
    pieces = [tokenizer.processor.id_to_piece(i) for i in range(tokenizer.size)]
    assert pieces[0] == "<unk>" and pieces[1] == "<0x00>" and pieces[256] == "<0xFF>"
    assert pieces[257:] == ["aa", "aab", "▁aab", "a", "b", "▁"]
    assert tokenizer.encode("aab aab") == [258, 259]
    assert tokenizer.encode("ba") == [261, 260]
    assert tokenizer.encode("z") == [1 + ord("z")]
    assert tokenizer.decode([258, 259]) == "aab aab"


def test_no_special_pieces_and_empty_text(tokenizer):
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    processor = tokenizer.processor
    assert (processor.bos_id(), processor.eos_id(), processor.pad_id(), processor.unk_id()) == (-1, -1, -1, 0)
    assert tokenizer.size == 320


def test_the_same_input_gives_the_same_model(tokenizer):
    assert train_text(CAPTIONS, 320).model == tokenizer.model


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "text.model")
    loaded = TextTokenizer.load(tmp_path / "text.model")
    assert loaded.model == tokenizer.model
    assert loaded.encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])


def test_bytes_that_are_not_utf8_become_replacement_characters(tokenizer):
    assert tokenizer.decode([1 + 0xC3]) == "\ufffd"
    assert "\ufffd" in tokenizer.decode([0])


def test_ids_out_of_range_are_refused(tokenizer):
    with pytest.raises(ValueError, match="id 320 is not a text piece; text ids are 0 to 319"):
        tokenizer.decode([3, 320])


def test_the_error_of_a_too_large_vocabulary_names_the_largest_size():
    with pytest.raises(ValueError, match=r"vocab_size \(5000\) .* largest possible is (\d+)") as error:
        train_text(CAPTIONS, 5000)
    largest = int(str(error.value).split("possible is ")[1].split(".")[0])
    assert train_text(CAPTIONS, largest).size == largest


def test_the_error_of_a_too_small_vocabulary_names_the_smallest_size():
    with pytest.raises(ValueError, match=r"vocab_size \(100\) must be at least (\d+)") as error:
        train_text(CAPTIONS, 100)
    smallest = int(str(error.value).split("at least ")[1].split(" ")[0])
    assert train_text(CAPTIONS, smallest).size == smallest


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_a_corpus_without_text_is_refused(captions):
    with pytest.raises(ValueError, match="all captions of the input are empty"):
        train_text(captions, 300)


def test_load_errors_are_readable(tmp_path):
    with pytest.raises(ValueError, match=r"no text tokenizer at .*train_tokenizer\.py text"):
        TextTokenizer.load(tmp_path / "text.model")
    (tmp_path / "text.model").write_bytes(b"\x00damaged")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "text.model")
