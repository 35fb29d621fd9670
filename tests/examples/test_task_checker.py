"""Verdicts on results of the shapes tasks: true ones are right, wrong ones miss the requirement that they break."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from examples.shapes import task_checker, tasks
from examples.shapes.drawing import COLORS, IMAGE_SIZES, POSITIONS, all_combinations, draw_mask
from examples.shapes.edits import KINDS, choose_edit
from examples.shapes.scenes import CORNERS, choose_scenes, draw_scene
from examples.shapes.tasks import list_boxes
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.images import from_pixels, to_pixels
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig

COMBINATIONS = all_combinations()
EVERYTHING = frozenset(tuple(entry.values()) for entry in COMBINATIONS)
COUNT = 24


def choose(count=COUNT, seed=5):
    return [(scene, jitter) for scene, jitter, _ in choose_scenes(COMBINATIONS, count, 3, seed)]


def choose_edits(seed=6):
    """(edit, jitter) of every kind."""
    random = np.random.default_rng(seed)
    kinds = list(KINDS)
    found = []
    for number, (scene, jitter) in enumerate(choose(2 * COUNT, seed)):
        edit = choose_edit(scene, kinds[number % len(kinds)], EVERYTHING, False, random)
        if edit and len(found) < COUNT:
            found.append((edit, jitter))
    assert len(found) == COUNT and {edit.kind for edit, _ in found} == set(kinds)
    return found


def match_edit(image, edit, jitter):
    return task_checker.match_edit(image, edit.before, edit.after, edit.index, jitter)


def blur(image, random):
    """The image as a small tokenizer reconstructs it: blurred, with noise."""
    noisy = np.clip(image + random.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).filter(ImageFilter.GaussianBlur(0.7))


def shift_object(scene, index, jitter, move, size):
    """The scene with object `index` moved by some pixels."""
    others = [entry for number, entry in enumerate(scene) if number != index]
    image = draw_scene(others, jitter, size) if others else draw_scene(scene, (99, 99), size)
    moved = tuple(one + other for one, other in zip(jitter, move, strict=True))
    entry = scene[index]
    image[draw_mask(entry["shape"], entry["size"], entry["position"], moved, size)] = COLORS[entry["colour"]]
    return image


def add_mark(image, scene):
    """A square that is too small for an object in a corner that the scene leaves free; the image is changed."""
    row, column = POSITIONS[next(corner for corner in CORNERS if corner not in {each["position"] for each in scene})]
    place = image[row - 2 : row + 2, column - 2 : column + 2]
    place += np.uint8(128)  # modulo 256
    return image


def change(scene, index, name):
    """The scene with another value of an attribute of one object."""
    values = {"colour": ("red", "blue"), "shape": ("cross", "circle"), "size": ("small", "large")}[name]
    entry = scene[index]
    changed = [*scene]
    changed[index] = entry | {name: values[0] if entry[name] != values[0] else values[1]}
    return changed


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_true_edits_are_right_and_others_wrong(size):
    random = np.random.default_rng(0)
    near = 1 + size // 64  # pixels by which an object that must stay is seen to move
    for number, (edit, jitter) in enumerate(choose_edits()[: COUNT if size == 32 else 6]):
        after = draw_scene(edit.after, jitter, size)
        assert match_edit(after, edit, jitter) == {"right": True, "changed": True, "unchanged": True}
        if size == 32:
            assert match_edit(blur(after, random), edit, jitter)["right"]
        before = match_edit(draw_scene(edit.before, jitter, size), edit, jitter)
        assert before == {"right": False, "changed": False, "unchanged": True}
        name = ("colour", "shape", "size")[number % 3]
        other = (edit.index + 1) % len(edit.after)
        wrong = match_edit(draw_scene(change(edit.after, other, name), jitter, size), edit, jitter)
        assert not wrong["right"]
        if other != edit.index:
            assert wrong == {"right": False, "changed": True, "unchanged": False}
            moved = match_edit(shift_object(edit.after, other, jitter, (near, 0), size), edit, jitter)
            assert moved["changed"] and not moved["unchanged"]
        elif edit.kind == "recolor":
            assert not match_edit(shift_object(edit.after, 0, jitter, (0, near), size), edit, jitter)["right"]


def test_what_nobody_asked_for_is_seen():
    edit, jitter = next((edit, jitter) for edit, jitter in choose_edits() if len(edit.after) == 2)
    image = draw_scene(edit.after, jitter, 32)
    add_mark(image, edit.after)
    assert match_edit(image, edit, jitter) == {"right": False, "changed": True, "unchanged": False}
    other = [entry | {"background": "white" if entry["background"] != "white" else "black"} for entry in edit.after]
    assert not match_edit(draw_scene(other, jitter, 32), edit, jitter)["right"]
    assert not match_edit(draw_scene(edit.after[edit.index :][:1], jitter, 32), edit, jitter)["unchanged"]


def test_scenes_are_right_with_any_jitter_and_wrong_with_any_other_object():
    random = np.random.default_rng(1)
    for number, (scene, jitter) in enumerate(choose()):
        image = draw_scene(scene, jitter, 32)
        jittered = draw_scene(scene, (-jitter[1], jitter[0]), 32)
        for shown in (image, jittered, blur(image, random)):
            assert task_checker.match_scene(shown, scene)["right"]
        wrong = change(scene, number % len(scene), ("colour", "shape", "size")[number % 3])
        assert not task_checker.match_scene(draw_scene(wrong, jitter, 32), scene)["objects"]
        if len(scene) > 1:
            marked = task_checker.match_scene(add_mark(image, scene), scene)
            assert marked == {"right": False, "objects": True, "nothing else": False}


def test_controlled_images_must_have_the_places_of_the_condition():
    for scene, jitter in choose():
        assert task_checker.match_control(draw_scene(scene, jitter, 32), scene, jitter)["right"]
        away = tuple(-2 if shift > 0 else 2 for shift in jitter)
        verdict = task_checker.match_control(shift_object(scene, 0, jitter, away, 32), scene, jitter)
        assert not verdict["right"] and not verdict.get("places")


def test_boxes_must_overlap():
    random = np.random.default_rng(2)
    for number, (scene, jitter) in enumerate(choose(9)):
        image = draw_scene(scene, jitter, 32)
        boxes = list_boxes(scene, jitter, 32)
        right = {"right": True, "boxes": True, "nothing else": True}
        assert task_checker.match_ground(image, boxes, 32) == right
        assert task_checker.match_ground(blur(image, random), boxes, 32)["boxes"]
        moved = [each | {"box": [side + 3 for side in each["box"]]} for each in boxes]
        assert not task_checker.match_ground(image, moved, 32)["boxes"]
        wrong = draw_scene(change(scene, 0, ("colour", "shape", "size")[number % 3]), jitter, 32)
        assert not task_checker.match_ground(wrong, boxes, 32)["right"]
        if len(scene) > 1:
            less = task_checker.match_ground(image, boxes[1:], 32)
            assert less == {"right": False, "boxes": True, "nothing else": False}
    scene, jitter = choose(3)[2]
    doubled = [each | {"box": [2 * side for side in each["box"]]} for each in list_boxes(scene, jitter, 32)]
    large = Image.fromarray(draw_scene(scene, jitter, 32)).resize((64, 64), Image.Resampling.NEAREST)
    assert task_checker.match_ground(large, doubled, 64)["boxes"]


def test_overlap_by_hand():
    assert task_checker.measure_overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert task_checker.measure_overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert task_checker.measure_overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert task_checker.measure_overlap((5, 5, 5, 5), (0, 0, 10, 10)) == 0


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("red", "red", True), (" Red.", "red", True), ("the red", "red", True), ("2", "two", True),
        ("top  left", "top left", True), ("Center", "centre", True), ("gray", "grey", True), ("none", "zero", True),
        ("blue", "red", False), ("red blue", "red", False), ("", "red", False), ("left top", "top left", False),
        ("no", "yes", False),
    ],
)  # fmt: skip
def test_answers_match_exactly_after_normalization(text, expected, right):
    assert task_checker.judge("vqa", {"answer": expected}, text) == {"right": right}


def test_texts_of_boxes_and_captions():
    record = {"box": "03 03 50 50", "missing": "ring", "scene": {"objects": choose(3)[1][0]}}
    for text, right in (
        ("03 03 50 50", True),
        ("6 3 50 50.", True),
        ("03 03 30 30", False),
        ("03 03 50", False),
        ("a b c d", False),
    ):
        assert task_checker.judge("infill_box", record, text)["right"] is right
    assert task_checker.judge("infill_text", record, "Ring")["right"]
    scene = record["scene"]["objects"]
    for phrasing in range(4):
        caption = tasks.write_scene_caption(scene, phrasing)
        assert task_checker.judge("caption", record, f"{caption}.")["right"]
        assert not task_checker.judge("caption", record, caption.replace(scene[0]["position"], "centre"))["right"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked") / "out"
    options = argparse.Namespace(tasks=["vqa", "edit"], train=26, heldout=26, size=32, objects=3, seed=0)
    tasks.write_tasks(folder, options)
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["task_checker.py", *map(str, arguments)])
    task_checker.main()


def test_files_of_results(written, tmp_path, monkeypatch, capsys):
    path = written / "edit-heldout.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{"id": each["id"], "image": str(written / each["edited" if number % 2 else "image"])}
             for number, each in enumerate(records)]  # fmt: skip
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    run(monkeypatch, "--task", "edit", "--records", path, "--results", results)
    printed = capsys.readouterr().out
    for name, share in (("all", 50), ("requirement: changed", 50), ("requirement: unchanged", 100),
                        ("phrasing: train", 0), ("phrasing: heldout", 100)):  # fmt: skip
        assert f"{name:<28} {share:6.1f} % of {13 if 'phrasing' in name else 26}" in printed
    run(
        monkeypatch,
        "--task",
        "vqa",
        "--records",
        written / "vqa-heldout.jsonl",
        "--chance",
        written / "vqa-train.jsonl",
    )
    share = float(capsys.readouterr().out.split(": ")[1].split()[0])
    assert 20 < share < 75
    results.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match=r"has no result for 25 of 26 records, such as edit-heldout-1\."):
        run(monkeypatch, "--task", "edit", "--records", path, "--results", results)
    with pytest.raises(ValueError, match=r"results.jsonl:1 has no text, which --task vqa needs"):
        run(monkeypatch, "--task", "vqa", "--records", written / "vqa-heldout.jsonl", "--results", results)
    with pytest.raises(ValueError, match="--ceiling is for tasks that generate images, not for --task vqa"):
        run(monkeypatch, "--task", "vqa", "--records", written / "vqa-heldout.jsonl", "--ceiling", "x")
    with pytest.raises(ValueError, match="--chance is for --task vqa, not for --task edit"):
        run(monkeypatch, "--task", "edit", "--records", path, "--chance", "x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty; give a file that tasks.py has written"):
        task_checker.judge_file("edit", tmp_path / "empty.jsonl", None)
    with pytest.raises(ValueError, match="the result for a must be a text: the task is vqa"):
        task_checker.judge("vqa", {"id": "a"}, Image.new("RGB", (32, 32)))


def test_the_ceiling_is_judged_on_what_the_image_tokenizer_decodes():
    torch.manual_seed(0)
    config = VQGANConfig(
        image_size=32, codebook_size=8, embed_dim=4, latent_channels=8, base_channels=8, channel_multiplier=(1, 1),
        num_res_blocks=0, mid_attention=False, norm="pixel", encoder_kernel=1,
    )  # fmt: skip
    tokenizer = ImageTokenizer(VQGAN(config))
    scene, jitter = choose(1)[0]
    image = Image.fromarray(draw_scene(scene, jitter, 32))
    passed = task_checker.pass_through(SimpleNamespace(image=tokenizer), [image] * 3, batch_size=2)
    assert len(passed) == 3 and passed[0].tobytes() == passed[2].tobytes()
    decoded = tokenizer.decode(tokenizer.encode(to_pixels(image, 32)[None]))[0]
    assert passed[0].tobytes() == from_pixels(decoded).tobytes()
    assert not task_checker.match_scene(passed[0], scene)["right"]  # it was not trained
