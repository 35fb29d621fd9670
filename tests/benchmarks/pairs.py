"""A corpus of the form that examples/icons/generate.py writes: colored shapes by name, in several styles."""

import json
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ("red", "blue", "green", "orange", "purple", "black", "brown")
SHAPES = ("circle", "square", "triangle", "bar")
STYLES = {"flat": "Flat style", "line": "Line style", "dots": "Dots style", "openmoji": "OpenMoji style"}
"""Source -> style."""


def draw(color: str, shape: str, source: str) -> Image.Image:
    """32 x 32 pixels on white."""
    image = Image.new("RGB", (32, 32), "white")
    pen = ImageDraw.Draw(image)
    look = {"outline": color, "width": 3} if source in ("line", "openmoji") else {"fill": color}
    inset = {"dots": 10, "openmoji": 2}.get(source, 6)
    box = (inset, inset, 31 - inset, 31 - inset)
    if shape == "circle":
        pen.ellipse(box, **look)
    elif shape == "triangle":
        pen.polygon([(16, inset), (31 - inset, 31 - inset), (inset, 31 - inset)], fill=look.get("fill"), outline=color)
    else:
        pen.rectangle((inset, 13, 31 - inset, 19) if shape == "bar" else box, **look)
    return image


def write_pairs(folder: Path) -> Path:
    """Write train.jsonl, heldout.jsonl and images; every fourth name is held out, and the style OpenMoji."""
    lines: dict[str, list[dict]] = {"train": [], "heldout": []}
    (folder / "images").mkdir(parents=True)
    for number, (color, shape) in enumerate(product(COLORS, SHAPES)):
        # Every color and every shape is held out in some names.
        held = (number + number // len(SHAPES)) % 4 == 0
        for source, style in STYLES.items():
            path = f"images/{source}-{color}-{shape}.png"
            draw(color, shape, source).save(folder / path)
            name = f"{color} {shape}"
            line = {"image": path, "caption": f"{name}, {style}", "name": name, "style": style, "source": source}
            lines["heldout" if held else "train"].append(line | {"heldout": "name" if held else ""})
    for split, found in lines.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder
