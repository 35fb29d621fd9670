"""Tasks on colored shapes: what their records hold, the splits, the texts of questions and edits, reproducibility."""

import argparse
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from examples.shapes import edits, questions, references, tasks
from examples.shapes.drawing import ATTRIBUTES, all_combinations, draw_mask
from examples.shapes.generate import split_combinations
from examples.shapes.scenes import draw_scene

RED = {"colour": "red", "shape": "ring", "size": "large", "position": "top left", "background": "grey"}
BLUE = {"colour": "blue", "shape": "ring", "size": "small", "position": "top right", "background": "grey"}
CROSS = {"colour": "red", "shape": "cross", "size": "small", "position": "bottom left", "background": "grey"}
SCENE = [RED, BLUE, CROSS]


def choose_options(**changes):
    values = {"tasks": list(tasks.TASKS), "train": 52, "heldout": 60, "size": 32, "objects": 3, "seed": 0}
    return argparse.Namespace(**values | changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of all tasks."""
    folder = tmp_path_factory.mktemp("tasks") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "SHEET", 4)
        tasks.write_tasks(folder, choose_options())
    return folder


def read(folder, task, split):
    return [json.loads(line) for line in (folder / f"{task}-{split}.jsonl").read_text().splitlines()]


def load(folder, name):
    with Image.open(folder / name) as image:
        return np.asarray(image.convert("RGB"))


def key(entry):
    return tuple(entry[name] for name in ATTRIBUTES)


def test_references_fit_one_object_and_hide_what_is_asked():
    assert references.list_references(SCENE, 2) == [
        "cross", "shape in the bottom left corner", "small red shape", "small cross",
        "small shape in the bottom left corner", "red cross", "red shape in the bottom left corner",
        "cross in the bottom left corner",
    ]  # fmt: skip
    assert references.list_references(SCENE, 2, hidden="position") == [
        "cross", "small red shape", "small cross", "red cross",
    ]  # fmt: skip
    assert references.list_references([RED, RED | {"position": "top right"}], 0, hidden="position") == []


def ask(kind, scene=SCENE, yes=True):
    """All questions of a kind: text -> answer."""
    random = np.random.default_rng(0)
    asked = [questions.ask_question(scene, kind, yes, False, random) for _ in range(150)]
    return {each.text: each.answer for each in asked if each}


def test_answers_by_hand(monkeypatch):
    assert ask("color")["What color is the cross?"] == "red"
    assert ask("shape")["What is the blue shape?"] == "ring"
    assert ask("size")["How big is the cross?"] == "small"
    assert ask("place")["Where is the blue ring?"] == "top right"
    assert set(ask("background").values()) == {"grey"} and set(ask("count").values()) == {"three"}
    counts = ask("count of a size")
    assert counts["How many small shapes are there?"] == "two" and counts["How many shapes are large?"] == "one"
    assert ask("count of a size", [RED])["How many small shapes are there?"] == "zero"
    assert set(ask("exists").values()) == {"yes"} and "Is there a red cross?" in ask("exists")
    missing = ask("exists", yes=False)
    assert (
        set(missing.values()) == {"no"}
        and "Is there a blue cross?" in missing
        and "Is there a blue ring?" not in missing
    )
    assert ask("attribute holds", yes=False)["Is the cross large?"] == "no"
    monkeypatch.setattr(
        questions, "choose_reference",
        lambda scene, index, random, hidden="": min(references.list_references(scene, index, hidden), key=len),
    )  # fmt: skip
    for kind, scene, text, answer in (
        ("larger", [RED, CROSS], "Is the ring larger than the cross?", "yes"),
        ("larger", [RED, CROSS], "Is the cross larger than the ring?", "no"),
        ("larger", [BLUE, CROSS], "Is the cross larger than the ring?", "no"),
        ("same size", [BLUE, CROSS], "Do the cross and the ring have the same size?", "yes"),
        ("same size", [RED, CROSS], "Is the cross as large as the ring?", "no"),
        ("left", [BLUE, CROSS], "Is the cross left of the ring?", "yes"),
        ("left", [RED, CROSS], "Is the cross left of the ring?", "no"),
        ("left", [BLUE, CROSS], "Is the ring to the right of the cross?", "yes"),
        ("above", [RED, CROSS], "Is the ring above the cross?", "yes"),
        ("above", [RED, BLUE], "Is the red ring above the blue ring?", "no"),
        ("above", [BLUE, CROSS], "Is the cross below the ring?", "yes"),
    ):
        assert ask(kind, scene, yes=answer == "yes")[text] == answer
    assert not ask("larger", [RED])  # needs two objects


def test_phrasings_of_training_are_not_held_out():
    for kinds in (questions.KINDS, edits.KINDS):
        for kind in kinds.values():
            assert len(set(kind.train)) >= 3 and len(set(kind.heldout)) == 2
            assert not set(kind.train) & set(kind.heldout)
    assert not set(tasks._PLAIN_CAPTIONS) & set(tasks._HELDOUT_CAPTIONS)


@pytest.mark.parametrize(
    ("kind", "instruction"),
    [
        ("recolor", "Make the cross yellow."),
        ("move", "Move the cross to the bottom left corner."),
        ("resize", "Make the blue ring small."),
        ("change shape", "Change the blue shape to an hourglass."),
    ],
)
def test_edits_change_one_attribute(kind, instruction):
    random = np.random.default_rng(1)
    after = [RED, BLUE | {"shape": "hourglass"} if kind == "change shape" else BLUE, CROSS]
    if kind == "recolor":
        after[2] = CROSS | {"colour": "yellow"}
    everything = frozenset(map(key, all_combinations()))
    instructions = set()
    for _ in range(200):
        edit = edits.choose_edit(after, kind, everything, False, random)
        differing = [number for number in range(3) if edit.before[number] != edit.after[number]]
        assert edit.after == after and differing == [edit.index]
        one, other = edit.before[edit.index], after[edit.index]
        assert [name for name in ATTRIBUTES if one[name] != other[name]] == [edits.KINDS[kind].attribute]
        assert len({entry["position"] for entry in edit.before}) == 3
        instructions.add(edit.instruction)
    assert instruction in instructions
    assert edits.choose_edit(after, kind, frozenset(), False, random) is None


def test_splits_have_no_combination_in_common(written):
    known, unknown = (set(map(key, combinations)) for combinations in split_combinations(0))
    assert not known & unknown
    for task in tasks.TASKS:
        records = read(written, task, "train")
        assert len(records) == 52
        for record in records:
            scenes = [record["scene"]["objects"], record.get("scene_before", record["scene"])["objects"]]
            assert {key(entry) for scene in scenes for entry in scene} <= known
        assert {record["phrasing"] for record in records} == {"train"}
        records = read(written, task, "heldout")
        assert all(key(entry) in unknown for record in records for entry in record["scene"]["objects"])
        phrasings = Counter(record["phrasing"] for record in records)
        assert phrasings == ({"train": 30, "heldout": 30} if task in tasks.INSTRUCTIONS else {"train": 60})
        assert len({record["id"] for record in records}) == 60


def test_images_show_the_scenes(written):
    for task in tasks.TASKS:
        for record in read(written, task, "heldout")[:6]:
            scene, jitter = record["scene"]["objects"], tuple(record["scene"]["jitter"])
            shown = load(written, record["edited" if task == "edit" else "image"])
            assert (shown == draw_scene(scene, jitter, 32)).all()
            if task == "edit":
                before = load(written, record["image"])
                touched = np.zeros((32, 32), bool)
                for name in ("scene_before", "scene"):
                    entry = record[name]["objects"][record["index"]]
                    touched |= draw_mask(entry["shape"], entry["size"], entry["position"], jitter, 32)
                assert ((before == shown).all(axis=2) | touched).all() and (before != shown).any()


def test_kinds_and_answers_are_balanced(written):
    records = read(written, "vqa", "train")
    assert Counter(record["kind"] for record in records) == dict.fromkeys(questions.KINDS, 4)
    answers = Counter(record["answer"] for record in records if record["kind"] in ("exists", "larger", "left"))
    assert answers == {"yes": 6, "no": 6}
    records = read(written, "edit", "heldout")
    assert Counter((record["kind"], record["phrasing"]) for record in records).most_common(1)[0][1] <= 8


def test_boxes_are_the_pixels_of_the_objects(written):
    for record in read(written, "ground", "heldout"):
        image, background = load(written, record["image"]), record["scene"]["objects"][0]["background"]
        for each, entry in zip(record["objects"], record["scene"]["objects"], strict=True):
            left, top, right, bottom = each["box"]
            assert 0 <= left < right <= 32 and 0 <= top < bottom <= 32
            mask = (image == tasks.COLORS[entry["colour"]]).all(axis=2)[top:bottom, left:right]
            assert mask.any(axis=0).all() and mask.any(axis=1).all()  # no row or column is empty
            assert each["name"] in record["caption"] and background in record["caption"]
    record = next(iter(read(written, "infill_box", "heldout")))
    assert record["blanked"].replace("___", record["box"]) == record["regions"]
    assert tasks.write_box([0, 8, 16, 32], 32) == "00 25 50 99"
    record = next(iter(read(written, "infill_text", "heldout")))
    assert record["blanked"].replace("___", record["missing"]) == record["caption"]


def test_captions_of_conditions_name_neither_place_nor_size(written):
    for task in ("control_canny", "control_scribble", "control_segmentation"):
        for record in read(written, task, "heldout"):
            assert not any(word in record["caption"] for word in ("small", "large", "corner", "centre"))
            shapes = [entry["shape"] for entry in record["scene"]["objects"]]
            assert len(set(shapes)) == len(shapes)
            condition = load(written, record["condition"])
            for entry in record["scene"]["objects"]:
                mask = draw_mask(entry["shape"], entry["size"], entry["position"], tuple(record["scene"]["jitter"]), 32)
                assert condition[mask].any()


def test_shuffled_records_have_the_instructions_of_others(written):
    records, shuffled = (read(written, "edit", split) for split in ("heldout", "shuffled"))
    assert Counter(record["instruction"] for record in records) == Counter(each["instruction"] for each in shuffled)
    same = [one["instruction"] == other["instruction"] for one, other in zip(records, shuffled, strict=True)]
    assert np.mean(same) < 0.1
    assert all(one["edited"] == other["edited"] for one, other in zip(records, shuffled, strict=True))


def test_a_seed_gives_the_same_files(written, tmp_path):
    options = choose_options(tasks=["edit", "control_canny"], train=4, heldout=60)
    tasks.write_tasks(tmp_path / "again", options)
    for task in ("edit", "control_canny"):
        name = f"{task}-heldout.jsonl"
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()
        for record in read(written, task, "heldout"):
            name = record["edited" if task == "edit" else "condition"]
            assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()
    options.seed = 1
    tasks.write_tasks(tmp_path / "other", options)
    assert (tmp_path / "other/edit-heldout.jsonl").read_bytes() != (written / "edit-heldout.jsonl").read_bytes()


def test_the_command(tmp_path, monkeypatch, capsys):
    arguments = ["tasks.py", "--output", str(tmp_path / "out"), "--train", "2", "--heldout", "2", "--tasks", "vqa"]
    monkeypatch.setattr("sys.argv", arguments)
    tasks.main()
    assert "vqa            2 training and 2 held-out records" in capsys.readouterr().out
    assert (tmp_path / "out/vqa.png").exists() and not (tmp_path / "out/edit.png").exists()
    with pytest.raises(ValueError, match=r"--output .*/out exists; give another folder"):
        tasks.main()
    monkeypatch.setattr("sys.argv", [*arguments, "--train", "1"])
    with pytest.raises(ValueError, match=r"--train \(1\) must be at least 2"):
        tasks.main()
