"""tools/make_conditions.py: records and images, interruptions, several workers, given maps, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.data.preprocess import conditions
from megatron_cm3leon.data.preprocess.conditions import ConditionSettings, make_conditions
from megatron_cm3leon.data.tasks.conditions import compute_canny
from tests.tools.call import call_tool


@pytest.fixture
def corpus(tmp_path):
    """Five images of a square, with depth maps (the fourth one too small); the input of the third is not an image."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = []
    for number in range(5):
        pixels = np.full((24, 32, 3), 255, np.uint8)
        pixels[4 : 12 + number, 6:20] = (200, 0, 30)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        side = 32 if number != 3 else 16
        Image.fromarray(np.tile(np.arange(side, dtype=np.uint16) * 100, (24, 1))).save(folder / f"{number}-depth.png")
        fields = {"image": f"{number}.png", "caption": f"square {number}", "depth": f"{number}-depth.png"}
        lines.append(json.dumps(fields) + "\n")
    (folder / "2.png").write_bytes(b"no image")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_folder(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_records_have_a_condition_of_their_image(corpus, tmp_path):
    arguments = ["--input", corpus / "pairs.jsonl", "--condition", "canny", "--output", tmp_path / "out"]
    done = call_tool("make_conditions", *arguments, "--max-bad-fraction", "0.3", "--sheet", "2")
    assert done.returncode == 0, done.stderr
    assert "4 pairs with canny; look at sheet.png" in done.stdout and "1 inputs are not usable" in done.stdout
    records = read_lines(tmp_path / "out/conditions.jsonl")
    assert [record["caption"] for record in records] == [f"square {number}" for number in (0, 1, 3, 4)]
    assert records[0]["depth"] == "0-depth.png"  # other fields are kept
    for record in records:
        with (
            Image.open(tmp_path / "out" / record["image"]) as image,
            Image.open(tmp_path / "out" / record["condition"]) as condition,
        ):
            assert condition.tobytes() == compute_canny(image).tobytes()
    (bad,) = read_lines(tmp_path / "out/quarantine.jsonl")
    assert bad["source"] == "pairs.jsonl:3" and bad["reason"].startswith("unreadable picture: 2.png")
    assert not (tmp_path / "out/parts").exists()
    with Image.open(tmp_path / "out/sheet.png") as sheet:
        assert sheet.width == 4 * 172 + 12
    again = call_tool("make_conditions", *arguments, "--max-bad-fraction", "0.3")
    assert again.returncode == 0 and "4 pairs" in again.stdout  # complete: nothing is done


def test_an_interrupted_run_and_several_workers_write_the_same_files(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "PART_SIZE", 2)
    settings = ConditionSettings("scribble", size=16)
    inputs = [str(corpus / "pairs.jsonl")]
    make_conditions(inputs, tmp_path / "whole", settings, max_bad_fraction=1)
    write_part, written = conditions.write_part, []

    def write_and_stop(source, part, folder, settings):
        if len(written) == 2:
            written.append("interrupted")
            raise KeyboardInterrupt
        written.append(part)
        write_part(source, part, folder, settings)

    monkeypatch.setattr(conditions, "write_part", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        make_conditions(inputs, tmp_path / "cut", settings, max_bad_fraction=1)
    assert not (tmp_path / "cut/conditions.jsonl").exists()
    assert make_conditions(inputs, tmp_path / "cut", settings, max_bad_fraction=1).written == 4
    assert written == [0, 1, "interrupted", 2]
    monkeypatch.undo()
    monkeypatch.setattr(conditions, "PART_SIZE", 2)
    make_conditions(inputs, tmp_path / "workers", settings, workers=2, max_bad_fraction=1)
    whole = read_folder(tmp_path / "whole")
    assert whole == read_folder(tmp_path / "cut") == read_folder(tmp_path / "workers")
    record = read_lines(tmp_path / "whole/conditions.jsonl")[0]
    for name in ("image", "condition"):
        with Image.open(tmp_path / "whole" / record[name]) as image:
            assert image.size == (16, 16)


def test_conditions_of_given_maps(corpus, tmp_path):
    settings = ConditionSettings("depth", map_field="depth", invert=True)
    counts = make_conditions([str(corpus / "pairs.jsonl")], tmp_path / "out", settings, max_bad_fraction=1)
    assert (counts.written, counts.quarantined) == (3, 2)
    record = read_lines(tmp_path / "out/conditions.jsonl")[0]
    with Image.open(tmp_path / "out" / record["condition"]) as condition:
        assert [condition.getpixel((column, 3))[0] for column in (0, 31)] == [255, 0]
    reasons = [line["reason"] for line in read_lines(tmp_path / "out/quarantine.jsonl")]
    assert (
        reasons[1] == "the depth condition has 16 x 24 pixels, but its image has 32 x 24; both must have the same size."
    )


def test_inputs_that_were_fixed_are_read_again(corpus, tmp_path):
    inputs, settings = [str(corpus / "pairs.jsonl")], ConditionSettings("canny")
    with pytest.raises(
        ValueError, match=r"1 inputs are not usable, more than --max-bad-fraction 0.1 allows, the first"
    ):
        make_conditions(inputs, tmp_path / "out", settings, max_bad_fraction=0.1)
    assert read_lines(tmp_path / "out/quarantine.jsonl")[0]["source"] == "pairs.jsonl:3"
    Image.new("RGB", (24, 32)).save(corpus / "2.png")
    assert make_conditions(inputs, tmp_path / "out", settings).written == 5


def test_missing_maps_and_fields(corpus, tmp_path):
    lines = [{"image": "0.png", "caption": "a", "depth": "none.png"}, {"image": "0.png", "caption": "b"}, {"text": "c"}]
    (corpus / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="holds no pair of an image and a caption"):
        settings = ConditionSettings("depth", map_field="depth")
        make_conditions([str(corpus / "pairs.jsonl")], tmp_path / "out", settings, max_bad_fraction=1)
    content = json.loads(Path(tmp_path / "out/parts/00000.json").read_text())
    assert [line["reason"] for line in content["quarantine"]] == [
        "missing map: none.png: No such file or directory",
        'field "depth" is missing, which --map-field names',
        "not a pair of an image and a caption",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ConditionSettings("edges"), r"--condition \(edges\) does not exist; give one of: canny, depth"),
        (ConditionSettings("canny", size=-1), r"--size \(-1\) must be at least 0"),
        (
            ConditionSettings("canny", map_field="edges"),
            "--map-field is for depth, normals, segmentation, not for --con",
        ),
        (ConditionSettings("depth"), "cannot be computed from an image alone; give its maps with --map-field"),
        (ConditionSettings("normals", map_field="n", invert=True), "--invert-map is for --condition depth with"),
    ],
)
def test_settings_that_do_not_fit(settings, message, corpus, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_conditions([str(corpus / "pairs.jsonl")], tmp_path / "out", settings)


def test_folders_that_hold_something_else(corpus, tmp_path):
    inputs = [str(corpus / "pairs.jsonl")]
    with pytest.raises(ValueError, match=r"is not empty and holds no manifest.json; give another --output"):
        make_conditions(inputs, corpus, ConditionSettings("canny"))
    make_conditions(inputs, tmp_path / "out", ConditionSettings("canny"), max_bad_fraction=1)
    with pytest.raises(ValueError, match=r"holds condition images made with condition=canny, not lines; give another"):
        make_conditions(inputs, tmp_path / "out", ConditionSettings("lines"))
    done = call_tool("make_conditions", "--input", *inputs, "--condition", "canny", "--output", "x", "--workers", "0")
    assert done.returncode == 2 and "--workers (0) must be at least 1" in done.stderr
