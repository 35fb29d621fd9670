"""Scenes of one to three colored shapes: captions and images agree, objects do not touch, the checker sees them."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from examples.shapes import generate, scene_checker, scenes
from examples.shapes.drawing import IMAGE_SIZES, PHRASINGS, all_combinations, draw_mask
from tests.distributed.launch import ROOT

RED = {"colour": "red", "shape": "ring", "size": "large", "position": "top left", "background": "grey"}
ORANGE = {"colour": "orange", "shape": "cross", "size": "small", "position": "bottom right", "background": "grey"}
BLUE = {"colour": "blue", "shape": "square", "size": "small", "position": "top right", "background": "grey"}


def choose(count=300, objects=3, seed=0):
    return scenes.choose_scenes(all_combinations(), count, objects, seed)


def test_captions_by_hand():
    assert scenes.write_scene_caption([RED, ORANGE], 0) == (
        "a large red ring in the top left corner and a small orange cross in the bottom right corner "
        "on a grey background"
    )
    assert scenes.write_scene_caption([RED, BLUE, ORANGE], 3) == (
        "three shapes on a grey background: a large red ring in the top left corner, a small blue square in the top "
        "right corner and a small orange cross in the bottom right corner"
    )
    assert scenes.write_scene_caption([RED], 0) == "a large red ring in the top left corner on a grey background"


def test_every_caption_reads_back_and_numbers_of_objects_are_equally_frequent():
    chosen = choose()
    assert Counter(len(scene) for scene, _, _ in chosen) == {1: 100, 2: 100, 3: 100}
    for scene, _, phrasing in chosen:
        assert scene_checker.parse_scene(scenes.write_scene_caption(scene, phrasing)) == scene
    phrasings = {len(scene): set() for scene, _, _ in chosen}
    for scene, _, phrasing in chosen:
        phrasings[len(scene)].add(phrasing)
    assert [len(phrasings[count]) for count in (1, 2, 3)] == [PHRASINGS, 4, 4]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a large red ring in the top left corner and a small blue cross on a grey background",
        "a large red ring in the top left corner and a small blue cross in the top left corner on a grey background",
        "a large red ring in the top left corner and a small blue cross in the top right corner",
        "a large red ring in the top left corner and a small blue cross in the centre on a grey background",
    ],
)
def test_captions_that_are_not_complete(text):
    assert scene_checker.parse_scene(text) is None and scene_checker.parse_caption(text) is None


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_objects_do_not_touch_and_the_checker_reads_every_clean_image(image_size):
    for scene, jitter, _ in choose(60):
        masks = [
            draw_mask(entry["shape"], entry["size"], entry["position"], jitter, image_size).astype(int)
            for entry in scene
        ]
        assert sum(masks).max() == 1
        found = scene_checker.find_objects(scenes.draw_scene(scene, jitter, image_size))
        assert scene_checker.describe_scene(found) == scene_checker.describe_scene(scene)


def test_the_checker_survives_blur_and_noise():
    random = np.random.default_rng(0)
    hits = []
    for scene, jitter, _ in choose(120):
        array = scenes.draw_scene(scene, jitter, 32).astype(np.float64)
        array = array * random.uniform(0.9, 1) + random.normal(0, 15, array.shape) + random.normal(0, 6, 3)
        image = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
        hits.append(scene_checker.classify(image) == scene_checker.describe_scene(scene))
    assert np.mean(hits) >= 0.95


def test_swapped_colors_are_wrong_in_the_objects_alone():
    swapped = [RED | {"colour": "orange"}, ORANGE | {"colour": "red"}]
    one, two = scene_checker.describe_scene([RED, ORANGE]), scene_checker.describe_scene(swapped)
    assert {name for name in one if one[name] != two[name]} == {"objects"}
    assert one["count"] == 2 and one["colour"] == ["orange", "red"]


def test_splits_have_no_object_in_common_and_the_file_is_judged(tmp_path):
    command = [sys.executable, ROOT / "examples/shapes/generate.py", "--output", tmp_path, "--pairs", "60"]
    subprocess.run([*command, "--objects", "3"], check=True, capture_output=True)
    seen = {}
    for split in ("train", "heldout"):
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        seen[split] = {tuple(entry.values()) for line in lines for entry in line["objects"]}
        assert all(scene_checker.parse_scene(line["caption"]) == line["objects"] for line in lines)
    assert not seen["train"] & seen["heldout"]
    assert set(scene_checker.judge_file(tmp_path / "heldout.jsonl").values()) == {1.0}
    done = subprocess.run([*command, "--objects", "4"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 4" in done.stderr


def test_one_object_is_the_corpus_of_before(tmp_path):
    generate.generate(tmp_path, 20, 32, 0)
    digest = hashlib.sha256((tmp_path / "train.jsonl").read_bytes())
    for path in sorted((tmp_path / "train").glob("*.png")):
        with Image.open(path) as image:
            digest.update(image.tobytes())
    assert digest.hexdigest() == "dc772c2219b3a153d2c40b736891416d050ddffad27549cf57a6ee36445180ec"


def test_messages(tmp_path):
    with pytest.raises(ValueError, match=r"--objects \(4\) must be from 1 to 3"):
        scenes.choose_scenes(all_combinations(), 3, 4, 0)
    (tmp_path / "odd.jsonl").write_text('{"image": "x.png", "caption": "a dog"}\n')
    with pytest.raises(ValueError, match=r"odd.jsonl:1: 'a dog' does not name a background"):
        scene_checker.judge_file(tmp_path / "odd.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty; give at least one line"):
        scene_checker.judge_file(tmp_path / "empty.jsonl")
