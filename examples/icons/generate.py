"""Write the corpus of icons: drawings of open icon sets, clip art, stamps and emoji, with names, styles and licenses.

    bash examples/icons/install_icons.sh          the packages, as root; see --help for those that are elsewhere
    python examples/icons/generate.py --output icons/ --workers 2

    icons/train.jsonl, heldout.jsonl   one line per image: {"image", "caption", "name", "style", "source", "category",
                                       "keywords", "references", "license", "license_url", "author", "heldout"}
    icons/images/SOURCE/NAME.png       64 x 64 on white
    icons/manifest.json                counts, what was filtered and why, the license of each source, versions

One name in ten is held out in all its styles ("heldout": "name"), and one style with all its names ("style"). An
interrupted run continues. Each drawing keeps its own license: use them here, but do not publish them as one set.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for running this file as a script

from examples.emoji.generate import CLDR, EMOJI_TEST, find_file
from examples.icons.clipart import list_clipart, list_emoji, list_stamps
from examples.icons.drawings import Drawing, draw_share
from examples.icons.duplicates import find_near_duplicates
from examples.icons.iconify import VERSION, list_icons, load_sets
from examples.icons.manifest import build_manifest, describe_inputs, print_summary
from examples.icons.names import EmojiNames
from examples.icons.render import REASONS, render_all
from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path

SOURCES = ("iconify", "openclipart", "stamps", "emoji")
HELDOUT_SHARE = 0.1
HELDOUT_STYLE = "fxemoji"
NEAR_DUPLICATE = 0.1
FEWEST_IMAGES = 20
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
ICONIFY = _CACHE / "megatron_cm3leon" / f"iconify-json-{VERSION}.tgz"
OPENCLIPART, STAMPS = "/usr/share/openclipart", "/usr/share/tuxpaint/stamps"


def find_input(option: str, path: str | Path, packages: str) -> Path:
    """The path, if it exists; the ValueError names the packages."""
    if Path(path).exists():
        return Path(path)
    raise ValueError(
        f"--{option} ({path}) does not exist; install it with bash examples/icons/install_icons.sh ({packages}), or "
        f"leave it out with --sources."
    )


def load_emoji_names() -> EmojiNames:
    """Unicode's list and CLDR's names, from the packages of examples/emoji."""
    listing = find_file("emoji list", None, [EMOJI_TEST])
    annotations = [find_file("annotations", None, [f"{CLDR}/annotations/en.xml"])]
    annotations += [path for path in [Path(CLDR) / "annotationsDerived/en.xml"] if path.is_file()]
    with listing.open(encoding="utf-8") as lines:
        return EmojiNames(lines, annotations)


def list_drawings(options: argparse.Namespace, filtered: dict[str, Counter]) -> list[Drawing]:
    """All drawings of the chosen sources; counts, per source, what is not used."""
    emoji = load_emoji_names()
    drawings: dict[str, list[Drawing]] = {}
    if "iconify" in options.sources:
        package = find_input("iconify", options.iconify, f"npm pack @iconify/json@{VERSION}")
        for name, content in load_sets(package, options.sets, options.logos).items():
            counts = filtered.setdefault(name, Counter())
            drawings[name] = list(list_icons(name, content, emoji, options.logos, counts))
    if "openclipart" in options.sources:
        root = find_input("openclipart", options.openclipart, "openclipart-png, openclipart-svg")
        counts = filtered.setdefault("openclipart", Counter())
        drawings["openclipart"] = list(list_clipart(root, options.logos, options.limit, counts))
    if "stamps" in options.sources:
        root = find_input("stamps", options.stamps, "tuxpaint-stamps-default")
        drawings["tuxpaint"] = list(list_stamps(root, filtered.setdefault("tuxpaint", Counter())))
    if "emoji" in options.sources:
        filtered.setdefault("notocoloremoji", Counter())
        drawings["notocoloremoji"] = list(list_emoji(list(emoji.by_text.values())))
    # The held-out style comes last: where another style has the same image, that one is kept.
    ordered = sorted(drawings, key=lambda source: source == options.heldout_style)
    return [drawing for source in ordered for drawing in _take(drawings[source], options.limit)]


def _take(drawings: list[Drawing], limit: int) -> list[Drawing]:
    """`limit` of the drawings of one source (0: all): those of the same names in every source."""
    if not limit:
        return drawings
    chosen = set(sorted(drawings, key=lambda drawing: draw_share("limit", drawing.concept))[:limit])
    return [drawing for drawing in drawings if drawing in chosen]


def filter_drawings(
    drawings: list[Drawing], status: np.ndarray, thumbnails: np.ndarray, filtered: dict[str, Counter]
) -> tuple[list[Drawing], dict[str, list[str]]]:
    """The drawings that are kept, and for the key of each the names of the near-duplicates that it stands for."""
    rendered = np.flatnonzero(status == 0)
    for drawing, reason in zip(drawings, status, strict=True):
        if reason:
            filtered[drawing.source][REASONS[reason]] += 1
    originals = find_near_duplicates(thumbnails[rendered], NEAR_DUPLICATE)
    kept, names = [], {}
    for number, original in zip(rendered, originals, strict=True):
        drawing = drawings[number]
        if original < 0:
            kept.append(drawing)
            names[drawing.key] = []
            continue
        filtered[drawing.source]["near-duplicate"] += 1
        shown = drawings[rendered[original]]
        if drawing.concept != shown.concept:
            names[shown.key].append(drawing.name)
    return kept, names


def hold_out(drawing: Drawing, seed: int, style: str) -> str:
    """Why a drawing is held out: "name", "style", "name and style", or "" for a training drawing."""
    reasons = ["name"] if draw_share("split", seed, drawing.concept) < HELDOUT_SHARE else []
    return " and ".join(reasons + (["style"] if drawing.source == style else []))


def write_lines(path: Path, drawings: list[tuple[Drawing, str]], names: dict[str, list[str]], captions: int) -> None:
    """Write a split as JSON Lines, `captions` lines per image, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as lines:
        for drawing, heldout in drawings:
            references = list(dict.fromkeys([*drawing.references(), *names[drawing.key]]))
            fields = {
                "name": drawing.name,
                "style": drawing.style,
                "source": drawing.source,
                "category": drawing.category,
                "keywords": list(drawing.keywords),
                "references": references,
                "license": drawing.license.spdx,
                "license_url": drawing.license.url,
                "author": drawing.license.author,
                "heldout": heldout,
            }
            for caption in drawing.captions()[:captions]:
                line = {"image": f"images/{drawing.key}.png", "caption": caption, **fields}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    temporary.replace(path)


def generate(options: argparse.Namespace) -> dict:
    """Build the corpus, or what is missing of it; returns the manifest."""
    started = time.monotonic()
    output = Path(options.output)
    settings = {
        name: getattr(options, name)
        for name in ("size", "sources", "sets", "logos", "limit", "captions", "seed", "heldout_style")
    }
    finished = output / "manifest.json"
    if finished.is_file():
        manifest = json.loads(finished.read_text(encoding="utf-8"))
        if manifest["settings"] != settings:
            changed = [name for name, value in settings.items() if manifest["settings"].get(name) != value]
            raise ValueError(
                f"--output ({output}) holds a corpus of another --{changed[0].replace('_', '-')} "
                f"({manifest['settings'].get(changed[0])}); give another folder or remove it first."
            )
        return manifest
    filtered: dict[str, Counter] = {}
    drawings = list_drawings(options, filtered)
    found = Counter(drawing.source for drawing in drawings)
    status, thumbnails = render_all(drawings, output, options.size, options.workers)
    kept, names = filter_drawings(drawings, status, thumbnails, filtered)
    splits = [(drawing, hold_out(drawing, options.seed, options.heldout_style)) for drawing in kept]
    n_heldout = sum(bool(heldout) for _, heldout in splits)
    if len(kept) < FEWEST_IMAGES or not 0 < n_heldout < len(kept):
        raise ValueError(
            f"--limit ({options.limit}) gives {len(kept)} images, {n_heldout} of them held out, but at least "
            f"{FEWEST_IMAGES} are required, with some in both splits; raise it or add --sources."
        )
    wanted_files = {output / "images" / f"{drawing.key}.png" for drawing in kept}
    for path in (output / "images").rglob("*.png"):
        if path not in wanted_files:
            path.unlink()
    for split, wanted in (("train", False), ("heldout", True)):
        chosen = [entry for entry in splits if bool(entry[1]) is wanted]
        write_lines(output / f"{split}.jsonl", chosen, names, options.captions)
    manifest = build_manifest(splits, found, filtered, options.captions)
    manifest = {"settings": settings, "inputs": describe_inputs(options), **manifest}
    manifest["seconds"] = round(time.monotonic() - started, 1)
    write_json(finished, manifest)
    shutil.rmtree(output / "parts")
    return manifest


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Render open icon sets, clip art, stamps and emoji as a corpus of pairs with names and styles.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=user_path, required=True, help="folder to write images/, both JSONL files and the manifest to")
    add("--size", type=int, default=64, help="image size in pixels, 16 to 136")
    add("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="what to read")
    add("--sets", nargs="+", metavar="SET", help="sets of Iconify (default: all with several colors)")
    add("--logos", action="store_true", help="also logos and trademarks, which are left out otherwise")
    add("--captions", type=int, default=1, choices=(1, 2, 3), help="lines per image, each with another caption")
    add("--limit", type=int, default=0, help="drawings per source; 0: all")
    add("--seed", type=int, default=0, help="seed of the split")
    add("--heldout-style", default=HELDOUT_STYLE, help="source that is held out with all its names")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")
    add("--iconify", type=user_path, default=str(ICONIFY), help="package @iconify/json, as npm's .tgz or a folder")
    add("--openclipart", type=user_path, default=OPENCLIPART, help="folder with svg/ and png/")
    add("--stamps", type=user_path, default=STAMPS, help="folder of Tux Paint's stamps")
    options = parser.parse_args(arguments)
    if not 16 <= options.size <= 136:
        raise ValueError(
            f"--size ({options.size}) must be from 16 to 136 pixels, as large as the bitmaps of the emoji font."
        )
    for name, least in (("limit", 0), ("workers", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} ({getattr(options, name)}) must be {least} or more.")
    try:
        import resvg_py  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            'the renderer resvg-py is not installed; install it by pip install -c constraints.txt -e ".[evaluation]".'
        ) from error
    return options


def main() -> None:
    options = parse_options()
    print_summary(generate(options))
    print(f"wrote {options.output}/train.jsonl, heldout.jsonl and manifest.json")


if __name__ == "__main__":
    run_tool(main)
