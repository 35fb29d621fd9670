"""Icons of @iconify/json, the npm package with all open icon sets: an SVG, a name, a category and a license each.

npm pack @iconify/json@2.2.535      the tarball is read as it is
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from examples.icons.drawings import Drawing, License
from examples.icons.names import EmojiNames, is_readable, is_trademark

VERSION = "2.2.535"
"""The version that examples/icons/install_icons.sh installs, and that the counts of the page are of."""
LOGO_SETS = ("Logos", "Programming")
"""Categories of whole sets of logos, in collections.json; `Programming` are logos of languages and tools."""
JOINED_SHARE = 0.05
"""A set in which fewer names have a separator writes words without any: "framewithpicture"."""
LONGEST_JOINED = 10
"""Letters of a name in such a set that may be one word which Unicode does not have."""
_LOGO_CATEGORIES = re.compile(r"(?i)\b(brands?|logos?)\b")


def read_members(package: Path, wanted) -> Iterator[tuple[str, dict]]:
    """(name, content) of the JSON files of the package, a folder or npm's tarball, whose name `wanted` accepts."""
    if package.is_dir():
        for path in sorted([package / "collections.json", *package.glob("json/*.json")]):
            if wanted(path.stem):
                yield path.stem, json.loads(path.read_text(encoding="utf-8"))
        return
    with tarfile.open(package, "r|gz") as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".json" and path.parts[1:-1] in ((), ("json",)) and wanted(path.stem):
                content = tar.extractfile(member)
                assert content is not None
                yield path.stem, json.load(content)


def load_sets(package: Path, sets: list[str] | None, logos: bool) -> dict[str, dict]:
    """Multi-colored sets of the package by name, those of `sets` alone where it is given; ValueError if one is absent.

    package: the folder or the .tgz of npm pack; logos: also sets of logos.
    """
    try:
        collections = dict(read_members(package, lambda name: name == "collections"))["collections"]
    except (tarfile.TarError, KeyError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"--iconify ({package}) is not the package @iconify/json ({type(error).__name__}: {error}); get it with "
            f"bash examples/icons/install_icons.sh, or npm pack @iconify/json@{VERSION}."
        ) from error
    usable = {
        name
        for name, info in collections.items()
        if info.get("palette") and not info.get("hidden") and (logos or info.get("category") not in LOGO_SETS)
    }
    if sets and (unknown := sorted(set(sets) - usable)):
        raise ValueError(
            f"--sets ({', '.join(unknown)}) must be multi-colored sets of {package}"
            f"{'' if logos else ' that are not logos (--logos)'}: {', '.join(sorted(usable))}."
        )
    chosen = set(sets) if sets else usable
    found = dict(read_members(package, chosen.__contains__))
    return {name: found[name] | {"collection": collections[name]} for name in sorted(found)}


def name_style(info: dict, suffix: str) -> str:
    """The style of a set as a caption names it: "Emoji One (v1)" -> "Emoji One v1 style"."""
    title = re.sub(r"[()]", "", info["name"].replace("(Colored)", ""))
    title = " ".join(re.sub(r"(?i)\bicons\b", "", title).split())
    return f"{title} {suffix} style" if suffix else f"{title} style"


def split_camel_case(text: str) -> str:
    """ "FoodDrink" -> "food drink"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).replace("&", "and").lower()


def make_svg(content: dict, icon: dict) -> str:
    """The SVG of an icon of the set `content`, as Iconify's own utilities put it together."""
    left, top = (icon.get(side, content.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, content.get(side, 16)) for side in ("width", "height"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def list_icons(name: str, content: dict, emoji: EmojiNames, logos: bool, filtered: Counter) -> Iterator[Drawing]:
    """The drawings of one set, in the order of its names; what is not used is counted in `filtered`."""
    info = content["collection"]
    license = License(info["license"]["spdx"], info["license"].get("url", ""), info["author"]["name"])
    codes = {icon: code for code, icon in content.get("chars", {}).items()}
    categories = {icon: category for category, icons in content.get("categories", {}).items() for icon in icons}
    joined = sum("-" in icon_name for icon_name in content["icons"]) < JOINED_SHARE * len(content["icons"])
    suffixes = sorted(filter(None, content.get("suffixes", {})), key=len, reverse=True)
    for icon_name, icon in content["icons"].items():
        category = categories.get(icon_name, "")
        if icon.get("hidden"):
            filtered["hidden"] += 1
        elif not logos and (_LOGO_CATEGORIES.search(split_camel_case(category)) or is_trademark(icon_name)):
            filtered["logo"] += 1
        elif drawing := _describe(name, icon_name, category, codes, suffixes, joined, content, emoji, license, icon):
            yield drawing
        else:
            filtered["unreadable name"] += 1


def _describe(
    set_name: str,
    icon_name: str,
    category: str,
    codes: dict[str, str],
    suffixes: list[str],
    joined: bool,
    content: dict,
    emoji: EmojiNames,
    license: License,
    icon: dict,
) -> Drawing | None:
    """The drawing of one icon; None if it has no name that can be a caption."""
    info = content["collection"]
    suffix = next((each for each in suffixes if icon_name.endswith(f"-{each}")), "")
    base = icon_name.removesuffix(f"-{suffix}") if suffix else icon_name
    found = emoji.find_by_codes(codes[icon_name]) if icon_name in codes else None
    if info.get("category") == "Flags / Maps":
        found = emoji.find_flag(base)
        if not found:
            return None
    found = found or emoji.find_by_name(base, category)
    own = emoji.read_name(base, joined)
    unsplit = joined and " " not in own and len(own) > LONGEST_JOINED
    if not found and (unsplit or not is_readable(own)):
        return None
    return Drawing(
        key=f"{set_name}/{icon_name}",
        source=set_name,
        kind="svg",
        content=make_svg(content, icon),
        name=found.name if found else own,
        style=name_style(info, "" if suffix.isdigit() or re.search("[0-9]x", suffix) else suffix),
        license=license,
        keywords=found.keywords if found else (),
        category=found.group.lower().replace("&", "and") if found else split_camel_case(category),
    )
