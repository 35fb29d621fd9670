"""Write a corpus of colored shapes: images with captions, split into train/ and heldout/, as folders and as JSONL.

    python examples/shapes/generate.py --output shapes/ --pairs 6000 --size 32 --seed 0

    shapes/train/000000.png, 000000.txt ...   the folder format
    shapes/train.jsonl                        the JSONL format: one {"image", "caption", "attributes"} per line
    shapes/heldout/ and heldout.jsonl         the same for attribute combinations that do not occur in train/

A tenth of the 1,440 combinations is held out, each attribute value equally often: a model that draws them correctly has
learned the attributes and has not memorized images.

With --objects 3 an image shows one to three objects, each with a combination of its split, and a line has
{"image", "caption", "objects"}: the attributes of each. scene_checker.py reads such images and captions.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for running this file as a script

from examples.shapes.drawing import (
    ATTRIBUTES,
    IMAGE_SIZES,
    JITTERS,
    PHRASINGS,
    all_combinations,
    draw_image,
    write_caption,
)
from examples.shapes.scenes import MOST_OBJECTS, choose_scenes, draw_scene, write_scene_caption
from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.common.progress import track

HELDOUT_COMBINATIONS = 144
HELDOUT_SHARE = 0.1


def split_combinations(seed: int) -> tuple[list[dict], list[dict]]:
    """Split the combinations into (train, heldout), with balanced attribute values in heldout."""
    combinations = all_combinations()
    order = np.random.default_rng((seed, 0)).permutation(len(combinations))
    counts = {name: dict.fromkeys(values, 0) for name, values in ATTRIBUTES.items()}
    heldout: set[int] = set()
    for _ in range(HELDOUT_COMBINATIONS):
        # Greedy: the combination whose values were held out least often so far, relative to their share.
        chosen = min(
            (number for number in order if number not in heldout),
            key=lambda number: sum(
                (counts[name][value] * len(ATTRIBUTES[name])) ** 2 for name, value in combinations[number].items()
            ),
        )
        heldout.add(chosen)
        for name, value in combinations[chosen].items():
            counts[name][value] += 1
    train = [combinations[number] for number in order if number not in heldout]
    return train, [combinations[number] for number in order if number in heldout]


def choose_pairs(combinations: list[dict], pairs: int, seed: int) -> list[tuple[dict, tuple[int, int], int]]:
    """Choose (attributes, jitter, phrasing) of each pair.

    Every combination is used once before any is used twice, and a combination uses its nine jitters before it repeats
    an image.
    """
    random = np.random.default_rng((seed, 1, len(combinations)))
    jitters = np.stack([random.permutation(len(JITTERS)) for _ in combinations])
    chosen = []
    for number in range(pairs):
        repetition, position = divmod(number, len(combinations))
        if position == 0:
            order = random.permutation(len(combinations))
        combination = order[position]
        jitter = JITTERS[jitters[combination, repetition % len(JITTERS)]]
        chosen.append((combinations[combination], jitter, int(random.integers(PHRASINGS))))
    return chosen


def write_split(output: Path, name: str, pairs: list, image_size: int) -> None:
    """Write one split: images and captions in a folder, and the JSONL file beside it.

    pairs: (attributes, or a scene of several objects; jitter; phrasing)
    """
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give another --output or remove it first.")
    with (output / f"{name}.jsonl").open("w") as lines:
        for number, (attributes, jitter, phrasing) in enumerate(track(pairs, label=name, unit="images")):
            is_scene = isinstance(attributes, list)
            caption = (write_scene_caption if is_scene else write_caption)(attributes, phrasing)
            path = folder / f"{number:06d}.png"
            Image.fromarray((draw_scene if is_scene else draw_image)(attributes, jitter, image_size)).save(path)
            path.with_suffix(".txt").write_text(caption + "\n")
            fields = {"image": f"{name}/{path.name}", "caption": caption}
            fields["objects" if is_scene else "attributes"] = attributes
            lines.write(json.dumps(fields) + "\n")


def generate(output: str | Path, pairs: int, image_size: int, seed: int, objects: int = 1) -> tuple[int, int]:
    """Write the corpus of `pairs` pairs; returns the numbers of training and of held-out pairs.

    objects: most objects in an image; one is the corpus of the quickstart, with the same bytes as ever.
    """
    if pairs < 10:
        raise ValueError(f"--pairs ({pairs}) must be at least 10: a tenth of them is held out.")
    heldout_pairs = round(pairs * HELDOUT_SHARE)
    counts = {"train": pairs - heldout_pairs, "heldout": heldout_pairs}
    for (name, count), combinations in zip(counts.items(), split_combinations(seed), strict=True):
        if objects == 1:
            write_split(Path(output), name, choose_pairs(combinations, count, seed), image_size)
        else:
            write_split(Path(output), name, choose_scenes(combinations, count, objects, seed), image_size)
    return pairs - heldout_pairs, heldout_pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a corpus of colored shapes; a tenth of the attribute combinations is held out.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder to write train/, heldout/ and their JSONL files to")
    parser.add_argument("--pairs", type=int, default=6000, help="number of pairs; a tenth of them is held out")
    parser.add_argument("--size", type=int, default=32, choices=IMAGE_SIZES, help="image size in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the jitters and the phrasings")
    parser.add_argument(
        "--objects", type=int, default=1, choices=range(1, MOST_OBJECTS + 1), help="most objects in an image"
    )
    options = parser.parse_args()
    train, heldout = generate(options.output, options.pairs, options.size, options.seed, options.objects)
    print(f"wrote {train} training and {heldout} held-out pairs of {options.size} pixels to {options.output}")


if __name__ == "__main__":
    run_tool(main)
