"""The text model in Hugging Face's form: tokenizer.json, which gives the same ids, and tokenizer_config.json.

The merges are all pairs of pieces that join to a piece, in the order of the pieces: SentencePiece joins the neighbors
that form the first piece in that order, Hugging Face the first pair in the list of merges. Pieces are written with real
spaces; SentencePiece's mark for a space, if a user types it, is then spelled in bytes, as in TextTokenizer. Image codes
and special tokens are plain entries without merges: no text is encoded as one.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # generated at run time
from tokenizers import decoders, models

from megatron_cm3leon.export.folder import write_json
from megatron_cm3leon.tokenizers.text import SPACE_MARK, TextTokenizer
from megatron_cm3leon.tokenizers.text_cache import is_divisible
from megatron_cm3leon.tokenizers.vocab import NAMED_SPECIALS, Vocabulary

PROBES = (
    "", " ", "     ", "a  b   c    ", " leading", "trailing ", "tab\tline\nreturn\r\n\n\n  indented",
    "ﬁ Ａ é e\u0301\u0323 ½ ½ İstanbul ß", "漢字 🙂👩‍👩‍👧🏽 \u00a0no-break \u200b \u2028",
    "3.14159 1,000,000 0x7f 1st 22nd",
    "▁mark▁▁ in ▁ text ▁", "\x00 zero \x7f \x1b[0m", "<0x41> <unk> </s> <break> <pad> <sentinel:0> <eoss> <image:0>",
    "it's well-known, isn't it? (yes) -- ... !!!! aaaaaaaaaa ababababa", "\U0010ffff \ue000 \ufffd",
    "العربية हिन्दी ไทย",
)  # fmt: skip
"""Text on which the two libraries have been seen to differ: spaces, marks, bytes, digits, names of special tokens."""


def write_tokenizer(folder: Path, text: TextTokenizer, vocabulary: Vocabulary, context: int) -> str:
    """Write both files and compare the ids of PROBES; return why no file was written, or an empty string.

    Only BPE without normalization, as tools/train_tokenizer.py trains, has an exact form. `context` is the model's
    length in tokens.
    """
    if not is_divisible(text):
        return "text.model is not a BPE model without normalization: no tokenizer.json gives its ids"
    pieces = ModelProto.FromString(text.model).pieces
    normal = {piece.piece.replace(SPACE_MARK, " "): number for number, piece in enumerate(pieces) if _is_normal(piece)}
    ids = {piece.piece: number for number, piece in enumerate(pieces) if not _is_normal(piece)} | normal
    names = special_names(ids, vocabulary)
    ids |= {name: vocabulary.image_start + code for code, name in enumerate(names)}
    assert sorted(ids.values()) == list(range(vocabulary.size)), "two ids have the same name"
    model = models.BPE(ids, list(_list_merges(normal)), byte_fallback=True, unk_token=pieces[0].piece, fuse_unk=False)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = dict(zip(NAMED_SPECIALS, names[vocabulary.image_size :], strict=False))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "bos_token": specials["</s>"],
            "eos_token": specials["</s>"],
            "pad_token": specials["<pad>"],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # text never becomes a special token
        },
    )
    compare_ids(folder, text, PROBES, "the built-in lines")
    return ""


def _is_normal(piece) -> bool:
    return piece.type == piece.NORMAL


def special_names(taken: dict[str, int], vocabulary: Vocabulary) -> list[str]:
    """Names of the image codes and of the special tokens; a name that is a text piece gets more brackets."""
    sentinels = [f"<sentinel:{number}>" for number in range(vocabulary.sentinels)]
    reserved = vocabulary.specials - len(NAMED_SPECIALS) - len(sentinels)
    names = [f"<image:{code}>" for code in range(vocabulary.image_size)]
    names += [*NAMED_SPECIALS, *sentinels, *(f"<reserved:{number}>" for number in range(reserved))]
    for number, name in enumerate(names):
        while name in taken:
            name = f"<{name}>"
        names[number] = name
    return names


def _list_merges(normal: dict[str, int]) -> Iterable[tuple[str, str]]:
    """Pairs of pieces, in the order in which they are joined."""
    for piece in sorted(normal, key=normal.__getitem__):
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in normal and piece[cut:] in normal:
                yield piece[:cut], piece[cut:]


def compare_ids(folder: Path, text: TextTokenizer, lines: Iterable[str], source: str) -> int:
    """Number of lines; ValueError with the first line for which tokenizer.json gives other ids than text.model."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    count = 0
    for count, line in enumerate(lines, 1):
        ids = text.encode(line)
        if tokenizer.encode(line).ids != ids or tokenizer.decode(ids, skip_special_tokens=False) != text.decode(ids):
            raise ValueError(
                f"tokenizer.json differs from text.model on line {count} of {source}: {line[:200]!r} has the ids "
                f"{tokenizer.encode(line).ids[:20]} instead of {ids[:20]}."
            )
    return count


def read_lines(path: str | Path) -> Iterable[str]:
    """Lines of a UTF-8 file without their ends; ValueError for a file that is missing or not UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--check-corpus {path} does not exist; give a text file.")
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--check-corpus {path} is not UTF-8: {error}.") from error
