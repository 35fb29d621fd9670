"""Emoji corpus: parsing of files written by hand; rendering only where the font and Unicode data are installed."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from examples.emoji import generate
from tests.distributed.launch import ROOT
from tests.examples.run import run_example

EMOJI_TEST = """\
# emoji-test.txt
# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified # \U0001f600 E1.0 grinning face
263A FE0F ; fully-qualified # \u263a\ufe0f E0.6 smiling face
263A ; unqualified # \u263a E0.6 smiling face
# group: People & Body
1F44B ; fully-qualified # \U0001f44b E0.6 waving hand
1F44B 1F3FB ; fully-qualified # \U0001f44b\U0001f3fb E1.0 waving hand: light skin tone
# group: Component
1F3FB ; component # \U0001f3fb E1.0 light skin tone
# group: Flags
1F1EB 1F1F7 ; fully-qualified # \U0001f1eb\U0001f1f7 E2.0 flag: France
"""

ANNOTATIONS = """\
<?xml version="1.0" encoding="UTF-8" ?>
<!DOCTYPE ldml SYSTEM "../../common/dtd/ldml.dtd">
<ldml><annotations>
<annotation cp="\U0001f600">face | grin | Grinning face</annotation>
<annotation cp="\U0001f600" type="tts">grinning face</annotation>
<annotation cp="\u263a">face | smile</annotation>
<annotation cp="\u263a" type="tts">smiling face, says CLDR</annotation>
</annotations></ldml>
"""


def test_the_emoji_list_is_parsed():
    found = list(generate.parse_emoji_test(EMOJI_TEST.splitlines(), skin_tones=False))
    assert [(emoji.name, emoji.group) for emoji in found] == [
        ("grinning face", "Smileys & Emotion"),
        ("smiling face", "Smileys & Emotion"),
        ("waving hand", "People & Body"),
        ("flag: France", "Flags"),
    ]
    assert found[1].text == "\u263a\ufe0f" and found[3].codepoints == "1F1EB 1F1F7"
    with_tones = list(generate.parse_emoji_test(EMOJI_TEST.splitlines()))
    assert [emoji.name for emoji in with_tones][3] == "waving hand: light skin tone"


def test_captions_are_names_and_keywords_of_annotations(tmp_path):
    (tmp_path / "en.xml").write_text(ANNOTATIONS, encoding="utf-8")
    known = generate.parse_annotations([tmp_path / "en.xml"])
    grinning, smiling, waving, _ = (
        generate.annotate(emoji, known) for emoji in generate.parse_emoji_test(EMOJI_TEST.splitlines(), False)
    )
    assert grinning.captions() == ["grinning face", "grinning face: face, grin"]
    assert smiling.name == "smiling face, says CLDR"  # found without the variation selector
    assert waving.captions() == ["waving hand"]  # CLDR has no annotation: the name of the list


def test_a_tenth_of_the_images_is_held_out():
    train, heldout = generate.split_images(50, 0)
    assert len(heldout) == 5 and sorted(train + heldout) == list(range(50))
    assert generate.split_images(50, 0) == (train, heldout) != generate.split_images(50, 1)


def test_missing_data_names_the_packages(tmp_path):
    for what, option, package in (
        ("font", "--font", "fonts-noto-color-emoji"),
        ("emoji list", "--emoji-list", "unicode-data"),
        ("annotations", "--annotations", "unicode-cldr-core"),
    ):
        with pytest.raises(ValueError, match=rf"no {what} at .*nowhere; install it .*in {package}\).*{option}"):
            generate.find_file(what, str(tmp_path / "nowhere"), [])


def test_options_out_of_range_and_an_invalid_font_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--size \(500\) must be from 8 to 136"):
        generate.parse_options(["--output", str(tmp_path), "--size", "500"])
    with pytest.raises(ValueError, match=r"--limit \(-1\) must be 0"):
        generate.parse_options(["--output", str(tmp_path), "--limit", "-1"])
    (tmp_path / "font.ttf").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"font.ttf is not a font with color bitmaps of 109 pixels"):
        generate.load_font(tmp_path / "font.ttf")


@pytest.fixture(scope="module")
def fonts():
    """Tests that need the Debian packages are skipped without them."""
    try:
        generate.find_file("font", None, generate.list_font_paths())
        generate.find_file("emoji list", None, [generate.EMOJI_TEST])
        generate.find_file("annotations", None, [f"{generate.CLDR}/annotations/en.xml"])
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def corpus(fonts, tmp_path_factory):
    """The first 60 emoji, rendered."""
    folder = tmp_path_factory.mktemp("emoji")
    options = generate.parse_options(["--output", str(folder), "--size", "32", "--limit", "60"])
    return folder, generate.generate(options)


def test_the_corpus_has_jsonl_and_text_files(corpus):
    folder, counts = corpus
    assert counts["emoji"] == 60 and counts["missing"] == 0 and counts["images"] <= 60
    seen = set()
    for split, share in (("train", 0.9), ("heldout", 0.1)):
        lines = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        images = sorted((folder / split).glob("*.png"))
        assert len(lines) == counts[split] and len(images) == round(share * counts["images"])
        assert {fields["image"] for fields in lines} == {f"{split}/{path.name}" for path in images}
        for path in images:
            with Image.open(path) as image:
                assert image.size == (32, 32) and image.mode == "RGB"
                assert np.asarray(image).std() > 10  # the image is not of one color
                content = image.tobytes()
            assert content not in seen  # no image twice, also not in both splits
            seen.add(content)
            assert path.with_suffix(".txt").read_text().strip()
    first = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    assert first["caption"] and first["name"] and first["group"] == "Smileys & Emotion"


def test_the_grinning_face_is_yellow(corpus):
    font = generate.load_font(generate.find_file("font", None, generate.list_font_paths()))
    image = generate.render(generate.Emoji(text="\U0001f600", name="", group=""), font, 32)
    red, green, blue = np.asarray(image)[10, 16].tolist()
    assert red > 200 and green > 150 and blue < 120
    assert np.asarray(image)[0, 0].tolist() == [255, 255, 255]
    assert generate.render(generate.Emoji(text="\U0001f600\U0001f600", name="", group=""), font, 32) is None


def test_a_second_run_into_the_same_folder_is_refused(corpus):
    folder, _ = corpus
    options = generate.parse_options(["--output", str(folder), "--limit", "20"])
    with pytest.raises(ValueError, match="is not empty; give another --output"):
        generate.generate(options)


@pytest.mark.slow  # 90 s of one core
def test_the_example_runs_without_a_checker(fonts, tmp_path):
    done = run_example("emoji.sh", "--small", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["heldout_accuracy"] is None and 0 < report["loss_with_retrieval"] < 20
    assert -1 <= report["clip_score"]["generated"] <= 1 and report["retrieval"] in (True, False)
    page = (tmp_path / "out/report.html").read_text()
    assert "Choice of guidance and retrieval" in page and "Held-out captions" in page


def test_where_nothing_can_be_installed_the_reason_is_printed(tmp_path):
    for program in ("bash", "dirname", "id"):  # no apt-get
        (tmp_path / program).symlink_to(shutil.which(program))
    command = ["bash", ROOT / "tests/examples/install_emoji.sh"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    packages = " ".join(generate.PACKAGES.values())
    assert done.returncode == 0
    assert f"emoji: only root on Debian or Ubuntu can install {packages} here; tests of what is" in done.stdout


def test_the_option_long_is_refused():
    done = run_example("emoji.sh", "--long")
    assert done.returncode == 2 and "emoji.sh has no --long" in done.stderr
