"""Drawings of Debian packages: openclipart, Tux Paint's stamps, and the emoji of examples/emoji."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from examples.emoji.generate import Emoji
from examples.icons.drawings import Drawing, License, draw_share
from examples.icons.names import clean_name, is_readable, is_trademark
from megatron_cm3leon.common.progress import track

GENERIC_FILES = 12
"""A title that more files of openclipart have is the title of a series and describes none of them."""
_GENERIC_TITLE = re.compile(
    r"(?i)\b(collection|theme|icon ?set|iconset|clip ?arts?|submission|sibmission|untitled)s?$|^part of "
)
_AUTHOR_PREFIX = re.compile(r"(?i)^clip ?art by .+? - ")
_ARTICLE = re.compile(r"(?i)^(an?|the) ")
_DC, _RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_PUBLIC_DOMAIN = "http://creativecommons.org/licenses/publicdomain/"
_EMOJI_LICENSE = License("OFL-1.1", "https://scripts.sil.org/OFL", "Google Inc")
_STAMPS_LICENSE = License("GPL-2.0-only", "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html", "Tux Paint")


def read_metadata(path: Path) -> dict:
    """{"title", "license", "author", "keywords"} of an SVG's Dublin Core metadata; absent ones are empty."""
    found: dict = {"title": "", "license": "", "author": "", "keywords": []}
    inside: list[str] = []
    for event, element in ElementTree.iterparse(path, events=("start", "end")):
        tag = element.tag
        if event == "start":
            inside.append(tag)
            continue
        inside.pop()
        text = " ".join((element.text or "").split())
        if tag == f"{_DC}title" and text:
            if f"{_DC}creator" in inside:
                found["author"] = found["author"] or text
            elif not any(each.endswith("Agent") for each in inside):
                found["title"] = found["title"] or text
        elif tag == f"{_RDF}li" and text and f"{_DC}subject" in inside:
            found["keywords"].append(text)
        elif tag.endswith("}license"):
            found["license"] = found["license"] or element.get(f"{_RDF}resource", "")
        elif tag.endswith("}metadata"):
            break
    return found


def clean_title(title: str) -> str:
    """A title as a name: without the author in front, remarks in parentheses and the number of a variant."""
    title = re.sub(r"\s*\([^)]*\)", "", _AUTHOR_PREFIX.sub("", title)).replace(" - ", ", ")
    return _ARTICLE.sub("", clean_name(re.sub(r"[-_ ]*\d+$", "", title)).strip(" .,"))


def list_clipart(root: Path, logos: bool, limit: int, filtered: Counter) -> Iterator[Drawing]:
    """Drawings of openclipart-png with the titles of openclipart-svg. Links to files of another folder are skipped.

    With a limit, so many files are read that about `limit` of them have a title of their own.
    """
    paths = [path for path in sorted((root / "png").rglob("*.png")) if not path.is_symlink()]
    if limit:
        paths = sorted(sorted(paths, key=lambda path: draw_share("limit", path.name))[: 3 * limit])
    described = []
    for path in track(paths, label="openclipart", unit="files"):
        source = (root / "svg" / path.relative_to(root / "png")).with_suffix(".svg")
        try:
            described.append((path, read_metadata(source)))
        except FileNotFoundError:
            filtered["no title"] += 1
        except ElementTree.ParseError:
            filtered["damaged metadata"] += 1
    titles = Counter(metadata["title"] for _, metadata in described)
    for path, metadata in described:
        name = clean_title(metadata["title"])
        relative = path.relative_to(root / "png").with_suffix("")
        if not metadata["title"]:
            filtered["no title"] += 1
        elif (
            titles[metadata["title"]] > GENERIC_FILES
            or _GENERIC_TITLE.search(name)
            or metadata["title"].startswith("Part of")
        ):
            filtered["generic title"] += 1
        elif not is_readable(name):
            filtered["unreadable name"] += 1
        elif "publicdomain" not in metadata["license"].lower():
            filtered["license not stated"] += 1
        elif not logos and (relative.parts[0] == "logos" or any(map(is_trademark, (name, *metadata["keywords"])))):
            filtered["logo"] += 1
        else:
            yield Drawing(
                key=f"openclipart/{relative.as_posix()}",
                source="openclipart",
                kind="file",
                content=str(path),
                name=name,
                style="clip art",
                license=License("LicenseRef-public-domain", _PUBLIC_DOMAIN, metadata["author"]),
                keywords=tuple(dict.fromkeys(map(clean_name, metadata["keywords"]))),
                category=relative.parts[0].replace("_", " "),
            )


def list_stamps(root: Path, filtered: Counter) -> Iterator[Drawing]:
    """Tux Paint's stamps with their English descriptions; letters and digits are skipped."""
    for path in sorted([*root.rglob("*.png"), *root.rglob("*.svg")]):
        relative = path.relative_to(root).with_suffix("")
        text = path.with_suffix(".txt")
        if path.stem.endswith("_mirror") or path.stem.endswith("_flip"):
            filtered["mirrored"] += 1
            continue
        if not text.is_file():
            filtered["no title"] += 1
            continue
        sentence = re.split(r"(?<=\w)[.!] |\n", text.read_text(encoding="utf-8"), maxsplit=1)[0]
        name = _ARTICLE.sub("", sentence.strip().rstrip(".!"))
        if relative.parts[:2] in (("symbols", "alphabets"), ("symbols", "math")):
            filtered["letter or digit"] += 1
        elif not is_readable(name):
            filtered["unreadable name"] += 1
        else:
            yield Drawing(
                key=f"tuxpaint/{relative.as_posix()}{'-svg' if path.suffix == '.svg' else ''}",
                source="tuxpaint",
                kind="file",
                content=str(path),
                name=name,
                style="Tux Paint stamp",
                license=_STAMPS_LICENSE,
                category=relative.parts[0],
            )


def list_emoji(emoji: list[Emoji]) -> Iterator[Drawing]:
    """The emoji of the font Noto Color Emoji, as examples/emoji renders them."""
    for one in emoji:
        yield Drawing(
            key=f"notocoloremoji/{one.codepoints.replace(' ', '-').lower()}",
            source="notocoloremoji",
            kind="emoji",
            content=one.text,
            name=one.name,
            style="Noto Emoji style",
            license=_EMOJI_LICENSE,
            keywords=one.keywords,
            category=one.group.lower().replace("&", "and"),
        )
