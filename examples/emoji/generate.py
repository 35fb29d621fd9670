"""Write the emoji corpus: every Noto color emoji with its CLDR name and keywords, split into train/ and heldout/.

    apt-get install --no-install-recommends fonts-noto-color-emoji unicode-data unicode-cldr-core
    python examples/emoji/generate.py --output emoji/ --size 64

    emoji/train/000000.png, 000000.txt ...   the folder format, one caption per image
    emoji/train.jsonl                        the JSONL format, one line per caption of an image: {"image", "caption",
                                             "name", "keywords", "group", "codepoints"}
    emoji/heldout/ and heldout.jsonl         a tenth of the images

Emoji that look the same (France, Clipperton Island) become one image with the captions of both, before the split.
Images are rendered from the font (SIL Open Font License): keep them, but do not publish them as a set.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for running this file as a script

from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.common.progress import track

FONTS = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "/usr/share/fonts/noto/NotoColorEmoji.ttf")
EMOJI_TEST = "/usr/share/unicode/emoji/emoji-test.txt"
CLDR = "/usr/share/unicode/cldr/common"
PACKAGES = {"font": "fonts-noto-color-emoji", "emoji list": "unicode-data", "annotations": "unicode-cldr-core"}

FONT_SIZE = 109
"""The only size of the font's bitmaps, in pixels; a glyph is 136 wide and 128 high."""
CANVAS = 136
HELDOUT_SHARE = 0.1
_SKIN_TONES = set(range(0x1F3FB, 0x1F400))
_VARIATION_SELECTOR = "\ufe0f"


@dataclass(frozen=True)
class Emoji:
    """One emoji: its characters, and its name, group and keywords from Unicode."""

    text: str
    name: str
    group: str
    keywords: tuple[str, ...] = ()

    @property
    def codepoints(self) -> str:
        return " ".join(f"{ord(character):04X}" for character in self.text)

    def captions(self) -> list[str]:
        """The name, and the name followed by the keywords that differ from it."""
        others = [word for word in self.keywords if word.lower() != self.name.lower()]
        return [self.name] + ([f"{self.name}: {', '.join(others)}"] if others else [])


def parse_emoji_test(lines, skin_tones: bool = True) -> Iterator[Emoji]:
    """Fully-qualified emoji of Unicode's emoji-test.txt, in the order of the file."""
    group = ""
    for line in lines:
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        codes, _, rest = line.partition(";")
        if line.startswith("#") or rest.split("#")[0].strip() != "fully-qualified":
            continue
        numbers = [int(code, 16) for code in codes.split()]
        if not skin_tones and _SKIN_TONES & set(numbers):
            continue
        # After the #: the emoji itself, the version (E1.0), the name.
        name = rest.split("#", 1)[1].split(maxsplit=2)[2].strip()
        yield Emoji(text="".join(map(chr, numbers)), name=name, group=group)


def parse_annotations(paths) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """Emoji without variation selectors -> CLDR's short name and keywords, from annotation files such as en.xml."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for path in paths:
        for entry in ElementTree.parse(path).iter("annotation"):
            emoji, text = entry.get("cp").replace(_VARIATION_SELECTOR, ""), (entry.text or "").strip()
            if entry.get("type") == "tts":
                names.setdefault(emoji, text)
            else:
                keywords.setdefault(emoji, tuple(word.strip() for word in text.split("|") if word.strip()))
    return {emoji: (names.get(emoji), keywords.get(emoji, ())) for emoji in names.keys() | keywords.keys()}


def annotate(emoji: Emoji, annotations: dict) -> Emoji:
    """The emoji with CLDR's name and keywords, where CLDR has them."""
    name, keywords = annotations.get(emoji.text.replace(_VARIATION_SELECTOR, ""), (None, ()))
    return Emoji(text=emoji.text, name=name or emoji.name, group=emoji.group, keywords=keywords)


def find_file(what: str, given: str | None, known) -> Path:
    """The file that the user gave, or the first known path that exists; the ValueError names the Debian package."""
    for path in [given] if given else known:
        if path and Path(path).is_file():
            return Path(path)
    tried = given or ", ".join(filter(None, known))
    option = "--" + what.replace(" ", "-")
    raise ValueError(
        f"no {what} at {tried}; install it (apt-get install --no-install-recommends {' '.join(PACKAGES.values())}; "
        f"it is in {PACKAGES[what]}) or give its path with {option}."
    )


def list_font_paths() -> list[str]:
    """Paths where the font may be: the one that fontconfig finds, then the usual ones."""
    found = ""
    if shutil.which("fc-match"):
        answer = subprocess.run(
            ["fc-match", "-f", "%{file}", "Noto Color Emoji"], capture_output=True, text=True, check=False
        )
        found = answer.stdout.strip()  # fontconfig returns another font if it has none of this name
    return [path for path in (found, *FONTS) if Path(path).name == "NotoColorEmoji.ttf"] or list(FONTS)


def load_font(path: Path) -> ImageFont.FreeTypeFont:
    """Open the bitmap font; ValueError if Pillow cannot combine emoji sequences or the font has no bitmaps."""
    if not features.check("raqm"):
        raise ValueError(
            "this Pillow was built without raqm, which combines emoji sequences such as flags; install Pillow from its "
            "wheels, or libraqm and fribidi."
        )
    try:
        return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(
            f"{path} is not a font with color bitmaps of {FONT_SIZE} pixels ({error}); give Debian's "
            f"NotoColorEmoji.ttf with --font."
        ) from error


def render(emoji: Emoji, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """The emoji on white, size x size; None if the font does not have it as one glyph."""
    left, top, right, bottom = font.getbbox(emoji.text)
    if right - left > CANVAS or right <= left:
        return None
    canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
    position = ((CANVAS - right - left) // 2, (CANVAS - bottom - top) // 2)
    ImageDraw.Draw(canvas).text(position, emoji.text, font=font, embedded_color=True)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def split_images(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the training images and of the held-out images, both ascending."""
    order = np.random.default_rng(seed).permutation(count)
    heldout = round(count * HELDOUT_SHARE)
    return sorted(order[heldout:].tolist()), sorted(order[:heldout].tolist())


def write_split(output: Path, name: str, images: list[tuple[Image.Image, list[Emoji]]], captions: int) -> int:
    """Write one split, images with the emoji that they show, in both formats; returns the lines of the JSONL file."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give another --output or remove it first.")
    count = 0
    with (output / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
        for number, (image, shown) in enumerate(images):
            path = folder / f"{number:06d}.png"
            image.save(path)
            path.with_suffix(".txt").write_text(shown[0].captions()[:captions][-1] + "\n", encoding="utf-8")
            for emoji, caption in [(one, text) for one in shown for text in one.captions()[:captions]]:
                fields = {"image": f"{name}/{path.name}", "caption": caption, "name": emoji.name}
                fields |= {"keywords": list(emoji.keywords), "group": emoji.group, "codepoints": emoji.codepoints}
                lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
                count += 1
    return count


def generate(options: argparse.Namespace) -> dict[str, int]:
    """Render, remove duplicates, split and write; returns counts."""
    font = load_font(find_file("font", options.font, list_font_paths()))
    listing = find_file("emoji list", options.emoji_list, [EMOJI_TEST])
    annotations = find_file("annotations", options.annotations, [f"{CLDR}/annotations/en.xml"])
    derived = annotations.parent.with_name("annotationsDerived") / annotations.name
    known = parse_annotations([annotations, *([derived] if derived.is_file() else [])])
    with listing.open(encoding="utf-8") as lines:
        emoji = [annotate(one, known) for one in parse_emoji_test(lines, options.skin_tones)]
    emoji = emoji[: options.limit or None]
    images: dict[bytes, tuple[Image.Image, list[Emoji]]] = {}
    missing = 0
    for one in track(emoji, label="render", unit="emoji"):
        image = render(one, font, options.size)
        if image is None:
            missing += 1
            continue
        images.setdefault(hashlib.sha256(image.tobytes()).digest(), (image, []))[1].append(one)
    kept = list(images.values())
    if len(kept) < 10:
        raise ValueError(
            f"--limit ({options.limit}) gives {len(kept)} different images, but at least 10 are required; raise it."
        )
    counts = {"emoji": len(emoji), "missing": missing, "images": len(kept)}
    for name, numbers in zip(("train", "heldout"), split_images(len(kept), options.seed), strict=True):
        counts[name] = write_split(Path(options.output), name, [kept[n] for n in numbers], options.captions)
    return counts


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Render Noto color emoji with their CLDR names as a corpus of pairs; a tenth is held out.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder to write train/, heldout/ and their JSONL files to")
    parser.add_argument("--size", type=int, default=64, help="image size in pixels, up to 136")
    parser.add_argument(
        "--captions",
        type=int,
        default=2,
        choices=(1, 2),
        help="captions per emoji: the name, and the name with keywords",
    )
    parser.add_argument(
        "--skin-tones",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="include the 1,785 emoji with a skin tone",
    )
    parser.add_argument("--limit", type=int, default=0, help="number of emoji to render; 0 renders all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    parser.add_argument("--font", help="NotoColorEmoji.ttf (default: found by fontconfig)")
    parser.add_argument("--emoji-list", help=f"emoji-test.txt (default: {EMOJI_TEST})")
    parser.add_argument("--annotations", help=f"CLDR annotations (default: {CLDR}/annotations/en.xml)")
    options = parser.parse_args(arguments)
    if not 8 <= options.size <= CANVAS:
        raise ValueError(f"--size ({options.size}) must be from 8 to {CANVAS} pixels, the size of the font's bitmaps.")
    if options.limit < 0:
        raise ValueError(f"--limit ({options.limit}) must be 0 (all) or more.")
    return options


def main() -> None:
    options = parse_options()
    counts = generate(options)
    print(
        f"wrote {counts['train']} training and {counts['heldout']} held-out pairs of {counts['images']} images "
        f"to {options.output}; of {counts['emoji']} emoji {counts['missing']} are not in the font and "
        f"{counts['emoji'] - counts['missing'] - counts['images']} look like another emoji"
    )


if __name__ == "__main__":
    run_tool(main)
