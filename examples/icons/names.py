"""Names of icons: what an icon shows, from its name in its set and from the names of Unicode where it is an emoji."""

import re
import unicodedata
from collections.abc import Iterable

from examples.emoji.generate import Emoji, annotate, parse_annotations, parse_emoji_test

_SMALL_WORDS = re.compile(r"\b(for|with|of|the|and|a|an|in|on)\b")
_SKIN_TONE = re.compile(r"-(medium-light|medium-dark|light|medium|dark)$")
_NUMBERS = re.compile(r"[- ](\d|one|two|three|four|five)$")
_SHORT_WORDS = frozenset(["in", "no", "of", "ok", "on", "up"])
LONGEST_WORD = 18
"""Letters; a longer run consists of several words."""
_REGIONAL_A = 0x1F1E6
_TAG_A = 0xE0061
_CHARACTERS = (*range(0x2190, 0x2C00), *range(0x1F000, 0x1FB00))
"""Arrows, symbols and pictographs: icons are named after them, whether they are emoji or not."""
_TRADEMARKS = """
    adobe alipay amazon android arduino artstation ati baidu bbc behance bing blackberry blogger bluesky bluetooth
    bytedance chrome chromium codepen debian discord dribbble dropbox ebay ecosia facebook facetime figma firefox
    fitbit flickr foursquare github gitlab gmail google gnome imdb inaturalist instagram ipad iphone javascript
    jellyfin kde kotlin linkedin linux macos mastercard mastodon microsoft mitsubishi musicbrainz netflix netscape
    nintendo openfoodfact openmoji openstreetmap osx paypal peertube photoshop pinterest pixelfed playstation
    reddit renault skype slack snapchat soundcloud spotify squarespace taobao telegram tiktok tinder trello tumblr
    twitch twitter typescript ubuntu vimeo vk webassembly wechat weibo whatsapp wikidata wikipedia winrar xbox
    yahoo youtube logo logos trademark trademarks
"""
TRADEMARKS = frozenset(_TRADEMARKS.split())
"""Words in the name of a drawing that shows a trademark, beside whole sets and categories of logos."""


def is_trademark(name: str) -> bool:
    """Whether a name has a word of TRADEMARKS."""
    return not TRADEMARKS.isdisjoint(re.findall(r"[a-z]+", name.lower()))


def compact(name: str) -> str:
    """Letters and digits of a name without its small words, by which the names of two sets are compared."""
    plain = unicodedata.normalize("NFKD", name.lower().replace("-", " ").replace("&", " "))
    return re.sub(r"[^a-z0-9]", "", _SMALL_WORDS.sub("", plain))


def split_words(text: str, vocabulary: frozenset[str]) -> str | None:
    """Words that make up `text` without spaces ("rainbowflag"), as few as possible; None if there are none."""
    best: list[list[str] | None] = [[], *[None] * len(text)]
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - 20), end):
            words = best[start]
            if words is None or text[start:end] not in vocabulary:
                continue
            known = best[end]
            if known is None or len(words) + 1 < len(known):
                best[end] = [*words, text[start:end]]
    found = best[-1]
    return " ".join(found) if found else None


def clean_name(name: str) -> str:
    """ "book-1" -> "book": spaces for other separators, without the number that tells variants apart."""
    name = _NUMBERS.sub("", name)
    return " ".join(re.sub(r"[-_]+", " ", name).split())


def is_readable(name: str) -> bool:
    """Whether a name can be a caption: a word of three letters, no code point (u1f600), no words without spaces."""
    if max(map(len, re.findall(r"\w+", name)), default=0) > LONGEST_WORD:
        return False
    return bool(re.search(r"[^\W\d_]{3}", name)) and not re.fullmatch(r"(?i)(u\+?)?[0-9a-f]{4,}", name)


class EmojiNames:
    """Finds the emoji that an icon shows, by its characters or by its name."""

    def __init__(self, lines: Iterable[str], annotations: list) -> None:
        """lines: of Unicode's emoji-test.txt; annotations: paths of CLDR's annotation files."""
        known = parse_annotations(annotations)
        self.by_text: dict[str, Emoji] = {}
        self.by_name: dict[str, Emoji] = {}
        words: set[str] = set()
        self.characters: dict[str, str] = {}
        for code in _CHARACTERS:
            if name := unicodedata.name(chr(code), "").lower():
                self.characters.setdefault(compact(name), name)
                words.update(re.findall("[a-z]+", name))
        for listed in parse_emoji_test(lines):
            emoji = annotate(listed, known)
            text = listed.text.replace("\ufe0f", "")
            self.by_text[text] = emoji
            character = unicodedata.name(text, "") if len(text) == 1 else ""
            for name in (emoji.name, listed.name, character):
                if name:
                    self.by_name.setdefault(compact(name), emoji)
                    words.update(re.findall("[a-z]+", name.lower()))
            words.update(word for keyword in emoji.keywords for word in re.findall("[a-z]+", keyword.lower()))
        # Two letters would complete every misspelled name.
        self.vocabulary = frozenset(word for word in words if len(word) > 2) | _SHORT_WORDS

    def find_by_codes(self, codes: str) -> Emoji | None:
        """codes: hexadecimal code points joined by "-", as in Iconify's `chars`."""
        text = "".join(chr(int(code, 16)) for code in codes.split("-"))
        return self.by_text.get(text.replace("\ufe0f", ""))

    def find_by_name(self, name: str, category: str = "") -> Emoji | None:
        """The emoji that has this name, as Unicode's list, CLDR or the character database gives it."""
        name = name.replace("flag-for-flag-", "flag-for-")
        shorter = name.removeprefix("flag-for-")
        flag = f"flag {shorter}" if category.lower() == "flags" else shorter
        for candidate in (name, clean_name(name), shorter, flag):
            if found := self.by_name.get(compact(candidate)):
                return found
        return None

    def find_flag(self, code: str) -> Emoji | None:
        """The flag of a country ("fr") or of a part of it ("gb-eng")."""
        code = code.lower()
        if re.fullmatch("[a-z]{2}", code):
            return self.by_text.get("".join(chr(_REGIONAL_A + ord(letter) - ord("a")) for letter in code))
        tags = "".join(chr(_TAG_A + ord(letter) - ord("a")) for letter in code if letter.isascii() and letter.isalpha())
        return self.by_text.get(f"\U0001f3f4{tags}\U000e007f")

    def read_name(self, name: str, joined: bool = False) -> str:
        """A readable name of an icon that is not a known emoji.

        joined: the set writes words without separators ("rainbowflag"), which are looked for in the names of Unicode.
        """
        name = _SKIN_TONE.sub(r"-\1-skin-tone", name) if not name.endswith("skin-tone") else name
        cleaned = clean_name(name)
        if character := self.characters.get(compact(cleaned)):
            return character
        if not joined:
            return cleaned
        runs = re.findall(r"[^\W\d]+|\d+", cleaned)
        return " ".join(run if run.isdigit() else split_words(run, self.vocabulary) or run for run in runs)
