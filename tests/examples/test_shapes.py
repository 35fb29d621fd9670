"""Colored shapes: captions and images agree, the split is balanced, the checker recognizes the shapes."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from examples.shapes import checker, drawing, generate

ROOT = Path(__file__).resolve().parents[2]


def test_1440_combinations_give_different_images():
    combinations = drawing.all_combinations()
    assert len(combinations) == 1440
    images = {
        drawing.draw_image(attributes, jitter, 32).tobytes()
        for attributes in combinations
        for jitter in drawing.JITTERS
    }
    assert len(images) == 1440 * 9


@pytest.mark.parametrize("image_size", drawing.IMAGE_SIZES)
def test_every_shape_is_inside_the_image(image_size):
    for shape in drawing.SHAPES:
        for size in drawing.EXTENTS:
            areas = {
                int(drawing.draw_mask(shape, size, position, jitter, image_size).sum())
                for position in drawing.POSITIONS
                for jitter in drawing.JITTERS
            }
            assert len(areas) == 1, (shape, size)


def test_every_phrasing_is_parsed():
    for attributes in drawing.all_combinations():
        captions = [drawing.write_caption(attributes, number) for number in range(drawing.PHRASINGS)]
        assert len(set(captions)) == drawing.PHRASINGS
        assert all(checker.parse_caption(caption) == attributes for caption in captions)


def test_captions_equal_those_written_by_hand():
    attributes = {
        "colour": "orange",
        "shape": "ring",
        "size": "small",
        "position": "top left",
        "background": "grey",
    }
    assert drawing.write_caption(attributes, 0) == "a small orange ring in the top left corner on a grey background"
    assert drawing.write_caption(attributes, 4) == "an orange ring, small, in the top left corner of a grey picture"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a small red circle on a white background",
        "a small large red circle in the centre on a white background",
        "a small red circle in the centre on a white or white background",
        "a small reddish circle in the centre on a white background",
        "a small red circle in the top corner on a white background",
    ],
)
def test_captions_without_exactly_five_attributes_are_not_parsed(text):
    assert checker.parse_caption(text) is None


@pytest.mark.parametrize("image_size", drawing.IMAGE_SIZES)
def test_the_checker_recognizes_every_image(image_size):
    for number, attributes in enumerate(drawing.all_combinations()):
        jitter = drawing.JITTERS[number % 9]
        found, error = checker.classify_with_error(drawing.draw_image(attributes, jitter, image_size))
        assert found == attributes
        assert error < 1


def test_the_checker_tolerates_blur_and_inexact_colors():
    random = np.random.default_rng(0)
    pairs = []
    for attributes in drawing.all_combinations()[::5]:
        jitter = drawing.JITTERS[random.integers(9)]
        array = drawing.draw_image(attributes, jitter, 32).astype(np.float64)
        array = array * random.uniform(0.9, 1) + random.normal(0, 15, array.shape) + random.normal(0, 6, 3)
        image = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
        pairs.append((attributes, checker.classify(image)))
    agreement = checker.measure_agreement(pairs)
    assert agreement["all"] >= 0.98, agreement


def test_the_checker_accepts_other_forms_of_an_image():
    attributes = drawing.all_combinations()[700]
    array = drawing.draw_image(attributes, (0, 1), 64)
    assert checker.classify(Image.fromarray(array).convert("RGBA")) == attributes
    assert checker.classify(array / 255.0) == attributes
    assert checker.classify(Image.fromarray(array).resize((256, 256))) == attributes
    with pytest.raises(ValueError, match=r"shape \[height, width, 3\], not \[8, 8\]"):
        checker.classify(np.zeros((8, 8)))


def test_the_split_is_balanced_seeded_and_disjoint():
    train, heldout = generate.split_combinations(0)
    train_keys = [tuple(attributes.values()) for attributes in train]
    heldout_keys = [tuple(attributes.values()) for attributes in heldout]
    assert (len(train_keys), len(heldout_keys)) == (1296, 144)
    assert not set(train_keys) & set(heldout_keys)
    for name, values in drawing.ATTRIBUTES.items():
        counts = Counter(attributes[name] for attributes in heldout)
        fair = 144 / len(values)
        assert all(abs(counts[value] - fair) <= 2 for value in values), (name, counts)
    assert generate.split_combinations(0) == (train, heldout)
    assert generate.split_combinations(1)[1] != heldout


def test_generate_writes_both_forms_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        subprocess.run(
            [
                sys.executable,
                ROOT / "examples/shapes/generate.py",
                "--output",
                tmp_path / name,
                "--pairs",
                "60",
            ],
            check=True,
            capture_output=True,
        )
    one, two = tmp_path / "one", tmp_path / "two"
    for split, count in (("train", 54), ("heldout", 6)):
        lines = [json.loads(line) for line in (one / f"{split}.jsonl").read_text().splitlines()]
        assert len(lines) == count == len(list((one / split).glob("*.png")))
        assert (one / f"{split}.jsonl").read_bytes() == (two / f"{split}.jsonl").read_bytes()
        for fields in lines:
            path = one / fields["image"]
            assert path.read_bytes() == (two / fields["image"]).read_bytes()
            assert path.with_suffix(".txt").read_text().strip() == fields["caption"]
            assert checker.parse_caption(fields["caption"]) == fields["attributes"]
        assert checker.judge_file(one / f"{split}.jsonl")["all"] == 1


def test_invalid_inputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--pairs \(3\) must be at least 10"):
        generate.generate(tmp_path, 3, 32, 0)
    generate.generate(tmp_path, 10, 32, 0)
    with pytest.raises(ValueError, match="is not empty; give another --output"):
        generate.generate(tmp_path, 10, 32, 0)
    (tmp_path / "odd.jsonl").write_text('{"image": "x.png", "caption": "a dog"}\n')
    with pytest.raises(ValueError, match=r"odd.jsonl:1: 'a dog' does not name each of colour, shape"):
        checker.judge_file(tmp_path / "odd.jsonl")
    with pytest.raises(ValueError, match="there is nothing to judge"):
        checker.measure_agreement([])
