"""tools/train_tokenizer.py: both orders, what it prints and writes, and errors with exit status 2."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.text import TextTokenizer
from tests.tools.call import TOOLS, call_tool

IMAGE_FLAGS = ["--image-size", 16, "--downsample", 4, "--codebook-size", 8, "--base-channels", 16]
IMAGE_FLAGS += ["--steps", 6, "--warmup-steps", 2, "--batch-size", 8]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as lines:
        for number in range(24):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            lines.write(json.dumps({"image": f"{number}.png", "caption": f"picture {number} of noise"}) + "\n")
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("order", [("text", "image"), ("image", "text")])
def test_the_second_tokenizer_in_either_order_writes_the_vocabulary(pairs, tmp_path, order):
    flags = {"text": ["--vocab-size", 280], "image": IMAGE_FLAGS}
    shared = ["--input", pairs, "--output", tmp_path, "--specials", 40, "--sentinels", 16]
    first = call_tool("train_tokenizer", order[0], *shared, *flags[order[0]])
    assert first.returncode == 0, first.stderr
    assert f"vocab.json is written when the {order[1]} tokenizer is" in first.stdout
    second = call_tool("train_tokenizer", order[1], *shared, *flags[order[1]])
    assert second.returncode == 0, second.stderr
    assert "vocab.json: 328 ids = 280 text + 8 image + 40 special" in second.stdout
    assert "4 x 4 tokens per image, 8 codes; 1 held-out images: PSNR" in first.stdout + second.stdout
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "image/config.json",
        "image/model.safetensors",
        "text.model",
        "vocab.json",
    ]
    assert Tokenizers.load(tmp_path).vocabulary.sentinels == 16
    training = json.loads((tmp_path / "image" / "config.json").read_text())["training"]
    assert training["steps"] == 6 and training["pictures"] == 23
    assert set(training["heldout"]) == {"pictures", "psnr_db", "codes_used", "codebook_perplexity"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["text", "--vocab-size", 9000], "vocab_size (9000) is more than the 24 captions can fill; the largest"),
        (["image", *IMAGE_FLAGS, "--downsample", 6], "--downsample (6) must be a power of 2"),
        (["image", *IMAGE_FLAGS, "--channel-multiplier", 1, 2], "--channel-multiplier has 2 numbers; --downsample 4"),
        (["image", *IMAGE_FLAGS, "--norm", "group"], "base_channels (16) must be a multiple of 32 with norm=group"),
        (["image", *IMAGE_FLAGS, "--device", "quick"], "--device (quick) is not a valid torch device"),
        (["image", *IMAGE_FLAGS, "--steps", 1], "warmup_steps (2) must leave steps for the codebook"),
    ],
)
def test_errors_are_one_sentence_and_status_2(pairs, tmp_path, arguments, message):
    done = call_tool("train_tokenizer", *arguments, "--input", pairs, "--output", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not list(tmp_path.rglob("*.*"))


def test_every_format_of_preprocessing_is_read(pairs, tmp_path):
    """img2dataset's tars (two files, one input without a caption), and a table as Excel writes it."""
    images = [path.read_bytes() for path in sorted(pairs.parent.glob("*.png"))]
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for position, image in enumerate(images[number::2]):
                members = [(f"{position}.png", image), (f"{position}.txt", b"a caption of noise, number %d" % position)]
                for name, content in members[: 1 if position == number == 0 else 2]:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    tars = ["--input", tmp_path / "0.tar", tmp_path / "1.tar", "--output", tmp_path / "tok"]
    text = call_tool("train_tokenizer", "text", *tars, "--vocab-size", 290)
    assert text.returncode == 0, text.stderr
    assert "1 of 24 inputs were skipped: 1 x no caption (the first: 0 has no .txt and no .json" in text.stdout
    image = call_tool("train_tokenizer", "image", *tars, *IMAGE_FLAGS, "--device", "cpu")
    assert image.returncode == 0 and "skipped" not in image.stdout, image.stderr
    training = json.loads((tmp_path / "tok/image/config.json").read_text())["training"]
    assert (training["pictures"], training["pictures_skipped"]) == (23, 0)
    table = tmp_path / "captions.csv"
    table.write_text("\ufeffid;title\r\n" + "".join(f"{n};a title of noise, number {n}\r\n" for n in range(9)))
    arguments = ["--input", table, "--caption-field", "title", "--output", tmp_path / "tok2", "--vocab-size", 290]
    done = call_tool("train_tokenizer", "text", *arguments)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stderr


def test_images_that_cannot_be_read_are_reported(pairs, tmp_path):
    lines = pairs.read_text().replace('"image": "', f'"image": "{pairs.parent}/').splitlines()
    lines += ['{"image": "absent\\\\1.png", "caption": "a"}', "no JSON", '{"caption": "b"}']
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    arguments = ["--input", tmp_path / "pairs.jsonl", "--heldout", pairs, "--output", tmp_path / "tok"]
    done = call_tool("train_tokenizer", "image", *arguments, *IMAGE_FLAGS)
    assert done.returncode == 0, done.stderr
    assert "24 held-out images" in done.stdout and "3 of 27 inputs were skipped: " in done.stdout
    for reason in (
        '1 x field "image" is missing (the first: the fields are caption)',
        "1 x not JSON (the first: Expect",
        "1 x missing picture (the first: absent\\1.png: its path has backslashes",
    ):
        assert reason in done.stdout


@pytest.mark.parametrize(("command", "kind"), [("text", "text"), ("image", "image")])
def test_an_input_without_usable_rows_is_explained_and_nothing_is_written(tmp_path, command, kind):
    (tmp_path / "rows.jsonl").write_text('{"filepath": "0.png", "title": "a"}\n' * 2)
    done = call_tool("train_tokenizer", command, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "tok")
    reason = '2 x field "image" is missing (the first: the fields are filepath, title). If image and caption have other'
    assert done.returncode == 2 and f"no {kind} in its 2 inputs: {reason}" in done.stderr
    assert not (tmp_path / "tok").exists()


def test_a_missing_input_exits_with_2(tmp_path):
    tool, missing = TOOLS / "train_tokenizer.py", tmp_path / "absent.jsonl"
    command = [sys.executable, tool, "text", "--input", missing, "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "absent.jsonl does not exist" in done.stderr


@pytest.mark.parametrize("command", ["text", "image"])
def test_help_shows_defaults(command):
    done = call_tool("train_tokenizer", command, "--help")
    assert done.returncode == 0 and "(default: 1024)" in done.stdout


def test_text_pieces_cover_the_templates_of_a_task(pairs, tmp_path):
    arguments = ["--input", pairs, "--task", "caption", "--vocab-size", 320, "--output", tmp_path]
    result = call_tool("train_tokenizer", "text", *arguments)
    assert result.returncode == 0, result.stderr
    assert len(TextTokenizer.load(tmp_path / "text.model").encode("Describe the given picture.")) <= 8
