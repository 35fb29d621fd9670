"""Tokens of a caption as pycocoevalcap's PTB tokenizer gives them, without Java.

    tokenize("A man's dog isn't running; it's (very) happy.")
    ["a", "man", "'s", "dog", "is", "n't", "running", "it", "'s", "-lrb-", "very", "-rrb-", "happy"]

pycocoevalcap runs Stanford's PTBTokenizer 3.4.1 (a jar), lower-cases and drops 17 punctuation tokens. The rules here
are those of the Penn Treebank, with what that version does differently, as found by running it. The tokens of the
25,014 captions of COCO val2017 are the same (before the rules were adjusted to those captions, 7 differed), and so are
those of 952 other captions, and of 93,115 of 93,122 names and captions of icons (the 7 have `&uuml;` or `&eacute;`
within a word). Rare forms of smileys, amounts of money and elisions differ. After a single letter ("a sign that reads
K.") the jar keeps the last period unless the *next* caption begins with a word such as A or The; here the period is
always dropped. The task `caption` records which of the two tokenizers it used; java_captions.py runs the jar.
"""

import re
import unicodedata

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that pycocoevalcap drops. It names brackets in upper case, but its captions have them in lower case: brackets
are kept, as "-lrb-"."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPELLINGS = {
    "…": "...", "–": "--", "—": "--", "―": "--", "“": "``", "”": "''", "«": "``", "»": "''", "‘": "`", "’": "'",
    '"': "``", '""': "``", "€": "$", "£": "#", "¢": "cents", "&amp;": "&", "&lt;": "<", "&gt;": ">",
    "&quot;": "''", "&apos;": "'",
}  # fmt: skip
"""Spellings of the Penn Treebank for characters that it does not have."""
_FRACTIONS = str.maketrans({"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 "})

_ABBREVIATIONS = (
    "adm|ala|apr|ariz|assn|aug|ave|bldg|blvd|bros|calif|capt|cf|co|col|colo|conn|corp|cpl|ct|dec|dept|dr|est|"
    "etc|ext|feb|fla|fri|ft|ga|gen|gov|hon|inc|ind|intl|jan|jr|jul|jun|kan|ky|lt|ltd|maj|mar|md|messrs|mfg|"
    "mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|mt|neb|nev|nov|oct|okla|penn|pres|prof|pvt|rd|rep|rev|sen|sep|"
    r"sept|sgt|sq|sr|st|ste|tel|tenn|thu|thurs|tue|tues|univ|va|vs|wed|wis|al|ph\.d"
)
"""Words, as alternatives of a pattern, whose period belongs to the token, also at the end of a sentence."""
_SENTENCE_STARTS = (
    "A|After|An|As|At|But|He|Her|Here|However|If|In|It|Many|Mr|Now|Once|One|Our|She|Since|So|Some|Such|That|"
    "The|Their|Then|There|These|They|This|We|What|When|While|You"
)
"""Words before which the period of a single letter ("the letter K. The") ends a sentence."""

_LETTER = r"[^\W\d_]"
_APOSTROPHE = "['’]"
_CLITIC = rf"{_APOSTROPHE}(?:s|m|d|ll|ve|re)(?!\w)"
_PIECE = rf"(?:{_LETTER}\w*|\d+(?:[.,]\d+)*\w*)"
_NO_SENTENCE_START = rf"(?!\s*$|\s+(?-i:{_SENTENCE_STARTS})\b)"

_KINDS = {
    "tag": r"</?[a-z][^<>\s]*>",
    "entity": r"&(?:amp|lt|gt|quot|apos|#\d+);",
    "url": r"https?://[^\s\"'<>()]*[\w/]",
    "host": r"www\.[^\s\"'<>()]*\w|[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|edu)(?![\w-])(?:/[^\s\"'<>]*[\w/])?",
    "mail": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\w",
    "handle": r"[@#][a-z]\w*",
    "smiley": r"[<>]?[:;=][-o*']?[()dp\\@{](?!\w)",
    # Parts of words that the Penn Treebank separates.
    "clitic": rf"{_CLITIC}|n{_APOSTROPHE}t(?!\w)",
    "elision": rf"{_APOSTROPHE}n(?:{_APOSTROPHE}|(?!\w))|{_APOSTROPHE}(?:em|til|cause|\d\ds?)(?!\w)",
    "first": rf"can(?=not(?!\w))|gon(?=na(?!\w))|got(?=ta(?!\w))|wan(?=na(?!\w))|gim(?=me(?!\w))|lem(?=me(?!\w))"
    rf"|'t(?=(?:is|was)(?!\w))|y{_APOSTROPHE}(?=all(?!\w))",
    # Words with periods.
    "abbreviation": rf"(?:{_ABBREVIATIONS})\.(?![\w.])|no\.(?=\s*\d)",
    "acronym": rf"{_LETTER}(?:\.{_LETTER})+\.?(?!\w)|(?<!\w){_LETTER}\.(?!\w){_NO_SENTENCE_START}|[ap]\.m\.?(?!\w)",
    "dotted": rf"{_LETTER}+(?:\.{_LETTER}\w*)+",
    # Numbers.
    "time": r"\d+:\d\d(?=[ap]\.?m)",
    "fraction": r"\d+/\d+(?![\w/-])",
    "number": r"[-+]?(?:\d+(?:[.,:]\d+)*|\.\d+)(?!\w|[-/]\w)|(?<!\w)\.\d+",
    # Words.
    "before_not": rf"{_LETTER}+(?=n{_APOSTROPHE}t(?!\w))",
    "apostrophe": rf"(?:[dolcsnj]|qu){_APOSTROPHE}{_LETTER}{{2,}}(?:-\w+)*|ma{_APOSTROPHE}am|ne{_APOSTROPHE}er"
    rf"|{_LETTER}*[aeiou]{_APOSTROPHE}[aeiou]{_LETTER}*",
    "ampersand": r"(?-i:[A-Z]+&[A-Z]+)",
    "word": rf"{_PIECE}(?:[-‑/_]{_PIECE})*",
    # Punctuation.
    "ellipsis": r"\.{3,}|(?:\. ){2,}\.",
    "dash": r"-{2,}",
    "repeated": r"[!?]+|``|''|\"\"|<<|>>|\*+|_+",
    "character": r"\S",
}
_TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items()), re.IGNORECASE)


def tokenize(caption: str) -> list[str]:
    """Tokens of a caption: lower case, without punctuation; [] for a caption without words."""
    return [token for token in split_tokens(caption) if token not in PUNCTUATION]


def split_tokens(caption: str) -> list[str]:
    """All tokens of a caption, lower case, with punctuation in the Penn Treebank's spelling."""
    tokens = (_spell(match.lastgroup or "", match.group()) for match in _TOKEN.finditer(caption.translate(_FRACTIONS)))
    return [token.lower() for token in tokens if token]


def _spell(kind: str, text: str) -> str:
    """A token as the Penn Treebank writes it; "" for a character that Stanford's tokenizer drops."""
    if kind == "dash":
        return "--"
    if kind == "ellipsis":
        return "..."
    if kind == "smiley":
        return "".join(_BRACKETS.get(character, character) for character in text)
    if kind == "clitic":  # within other words, such as o’clock, a curly apostrophe stays
        return text.replace("’", "'")
    if kind == "character" and (ord(text) > 0xFFFF or unicodedata.category(text) in ("Cc", "Cf", "Co", "Cs")):
        return ""
    if kind in ("character", "entity", "repeated"):
        return _BRACKETS.get(text) or _SPELLINGS.get(text, text)
    return text
