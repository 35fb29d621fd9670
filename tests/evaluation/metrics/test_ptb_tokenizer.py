"""Tokens of captions: exact cases, and the same as pycocoevalcap's PTB tokenizer where Java is installed."""

import pytest

from megatron_cm3leon.evaluation.metrics.java_captions import explain_missing, tokenize_with_java
from megatron_cm3leon.evaluation.metrics.ptb_tokenizer import split_tokens, tokenize

CASES = (
    (
        "A man's dog isn't running; they're \"happy\" (very).",
        "a man 's dog is n't running they 're happy -lrb- very -rrb-",
    ),
    (
        "I'm gonna cannot wanna gimme lemme 'tis o'clock",
        "i 'm gon na can not wan na gim me lem me 't is o'clock",
    ),
    (
        "It’s the dogs’ rock'n'roll — “yes”… no",
        "it 's the dogs rock 'n' roll yes no",
    ),
    (
        "Mr. Smith of St. Louis, U.S., at 5:30 p.m. etc.",
        "mr. smith of st. louis u.s. at 5:30 p.m. etc.",
    ),
    (
        "well-known red-and-white 3/4 cup, 1,000 people & $5.00",
        "well-known red-and-white 3/4 cup 1,000 people & $ 5.00",
    ),
    (
        "8th Ave. and the letter K. The boat/house.A dog",
        "8th ave. and the letter k the boat/house a dog",
    ),
    (
        "A sidewalk.outside of McDonald's, 50% of 10:30am",
        "a sidewalk.outside of mcdonald 's 50 % of 10:30 am",
    ),
    (
        "see http://x.com/y, www.google.com or a@b.com #winning @home #1",
        "see http://x.com/y www.google.com or a@b.com #winning @home # 1",
    ),
    (
        "the 1970's, '90s and 6'2\" [tall] {man} *wow!!*",
        "the 1970 's '90s and 6 2 -lsb- tall -rsb- -lcb- man -rcb- * wow !! *",
    ),
    (
        "café naïve ½ €5 £3 AT&T m&ms, <b>a</b> &amp; 30°",
        "café naïve 1/2 $ 5 # 3 at&t m & ms <b> a </b> & 30 °",
    ),
    (
        "Eight o’clock, Côte d’Ivoire; y’all don’t",
        "eight o’clock côte d’ivoire y’ all do n't",
    ),
    (
        "y'all don't ma'am ne'er e/f a--b - c",
        "y' all do n't ma'am ne'er e/f a b c",
    ),
    (
        "dog😀 日本語 ♥ no. 5 is not no. It says (hi)",
        "dog 日本語 ♥ no. 5 is not no it says -lrb- hi -rrb-",
    ),
)


@pytest.mark.parametrize(("caption", "tokens"), CASES)
def test_tokens(caption, tokens):
    assert " ".join(tokenize(caption)) == tokens


def test_captions_without_words():
    assert tokenize("") == tokenize(" . ... -- ' \n") == []
    assert split_tokens('"a"...') == ["``", "a", "``", "..."]


@pytest.mark.skipif(bool(explain_missing("tokenizer")), reason=str(explain_missing("tokenizer")))
def test_the_jar_gives_the_same_tokens():
    captions = [
        *(caption for caption, _ in CASES),
        "two\nlines\u2028and a tab\t",
        "",
        "A plain caption of a red circle on a white table",
    ]
    assert tokenize_with_java(captions) == [tokenize(caption) for caption in captions]
