"""Counts of a corpus: per source its license, images, names, captions and what was filtered; printed as a table."""

import argparse
import shutil
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from examples.icons.drawings import Drawing
from megatron_cm3leon.common.atomic_io import sha256_file

PACKAGES = {
    "openclipart": ("openclipart-png", "openclipart-svg"),
    "stamps": ("tuxpaint-stamps-default",),
    "emoji": ("fonts-noto-color-emoji",),
}
_NAMES = ("unicode-data", "unicode-cldr-core")


def describe_inputs(options: argparse.Namespace) -> dict[str, str]:
    """Versions of the Debian packages and of the renderer, and the SHA-256 of Iconify's tarball."""
    found = {"resvg-py": version("resvg-py"), "pillow": version("pillow")}
    if "iconify" in options.sources and Path(options.iconify).is_file():
        found["@iconify/json"] = f"{Path(options.iconify).name} sha256:{sha256_file(options.iconify)}"
    packages = [package for source in options.sources for package in PACKAGES.get(source, ())]
    for package in (*packages, *_NAMES):
        found[package] = _find_version(package)
    return found


def _find_version(package: str) -> str:
    """The version of an installed Debian package, "unknown" where dpkg does not know it."""
    if not shutil.which("dpkg-query"):
        return "unknown"
    command = ["dpkg-query", "-W", "-f", "${Version}", package]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def build_manifest(
    splits: list[tuple[Drawing, str]], found: Counter, filtered: dict[str, Counter], captions: int
) -> dict:
    """{"counts", "filtered", "licenses", "sources"} of the kept drawings and why each of them is held out.

    found: drawings per source before rendering; filtered: reasons per source; captions: lines per image.
    """
    reasons: Counter = Counter()
    for counts in filtered.values():
        reasons.update(counts)
    sources = {}
    for source in filtered:
        some = [(drawing, heldout) for drawing, heldout in splits if drawing.source == source]
        licenses = Counter(drawing.license.spdx for drawing, _ in some)
        license = some[0][0].license if some else None
        authors = {drawing.license.author for drawing, _ in some}
        sources[source] = {
            **count_entries(some, captions),
            "found": found[source] + sum(filtered[source][reason] for reason in filtered[source] if reason in _EARLY),
            "filtered": dict(filtered[source].most_common()),
            "licenses": dict(licenses),
            "license_url": license.url if license else "",
            "author": authors.pop() if len(authors) == 1 else f"{len(authors)} authors",
        }
    return {
        "counts": count_entries(splits, captions),
        "filtered": dict(reasons.most_common()),
        "licenses": dict(Counter(drawing.license.spdx for drawing, _ in splits).most_common()),
        "sources": sources,
    }


_EARLY = (
    "hidden",
    "logo",
    "unreadable name",
    "no title",
    "damaged metadata",
    "generic title",
    "license not stated",
    "mirrored",
    "letter or digit",
)
"""Reasons that are found before rendering."""


def count_entries(splits: list[tuple[Drawing, str]], captions: int) -> dict[str, int]:
    """Images, those of each split, distinct names, distinct captions that are written, and distinct references."""
    drawings = [drawing for drawing, _ in splits]
    return {
        "images": len(drawings),
        "train": sum(not heldout for _, heldout in splits),
        "heldout_name": sum("name" in heldout for _, heldout in splits),
        "heldout_style": sum("style" in heldout for _, heldout in splits),
        "names": len({drawing.concept for drawing in drawings}),
        "captions": len({text.lower() for drawing in drawings for text in drawing.captions()[:captions]}),
        "references": len({text.lower() for drawing in drawings for text in drawing.references()}),
    }


def print_summary(manifest: dict) -> None:
    """The counts per source, what was filtered, and the licenses."""
    columns = ("found", "images", "train", "heldout_name", "heldout_style", "names", "captions")
    print(f"{'source':<28}" + "".join(f"{column:>14}" for column in columns) + "  license")
    for source, counts in manifest["sources"].items():
        numbers = "".join(f"{counts[column]:>14,}" for column in columns)
        print(f"{source:<28}{numbers}  {', '.join(counts['licenses'])}")
    total = manifest["counts"] | {"found": sum(counts["found"] for counts in manifest["sources"].values())}
    print(f"{'all':<28}" + "".join(f"{total[column]:>14,}" for column in columns))
    for title in ("filtered", "licenses"):
        print(f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in manifest[title].items()))
