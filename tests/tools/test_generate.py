"""tools/generate.py from the command line, on a random model with real tokenizers and a real index."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.generation.documents import CompletionOptions
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.images import load_image, to_pixels
from tests.models import save_random_opt
from tests.tools.call import call_tool

COLOURS = {"red": (220, 0, 0), "green": (0, 150, 30), "blue": (0, 30, 235)}


def make(name, *arguments):
    """Call a tool that has to succeed."""
    done = call_tool(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    pairs = []
    for number in range(24):
        colour = list(COLOURS)[number % 3]
        pixels = np.full((16, 16, 3), COLOURS[colour], np.uint8)
        pixels[number % 16] = 255
        Image.fromarray(pixels).save(path / f"{number}.png")
        pairs.append({"image": f"{number}.png", "caption": f"a {colour} picture with a white line"})
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    specials = ["--specials", 16, "--sentinels", 4]
    tok = path / "exported"
    make("train_tokenizer", "text", "--input", path / "pairs.jsonl", "--vocab-size", 290, "--output", tok, *specials)
    make("train_tokenizer", "image", "--input", path / "pairs.jsonl", "--image-size", 16, "--downsample", 4,
         "--codebook-size", 8, "--steps", 2, "--warmup-steps", 1, "--output", tok, *specials)  # fmt: skip
    save_random_opt(tok, Tokenizers.load(tok).vocabulary, positions=128, init_std=0.2)
    (tok / "cm3leon.json").write_text('{"training": {}}')
    return path


def read_results(folder):
    return json.loads((folder / "generated.json").read_text())


def test_captions_of_a_file_are_drawn_as_those_of_the_command_line(world):
    (world / "captions.txt").write_bytes(b"a blue one\r\n\n \na green one\n")
    options = ["--model", world / "exported", "--output"]
    make("generate", "image", "a red one", "--from", world / "captions.txt", *options, world / "from file")
    make("generate", "image", "a red one", "a blue one", "a green one", *options, world / "from line")
    assert read_results(world / "from file")["made"] == read_results(world / "from line")["made"]
    assert read_results(world / "from file")["options"]["guidance"] == 2.0


@pytest.mark.parametrize(("content", "fault"), [(None, "is missing"), ("{}", "KeyError"), ('{"tr', "cannot be read")])
def test_an_export_tells_how_it_was_trained(world, tmp_path, content, fault):
    model = shutil.copytree(world / "exported", tmp_path / "model")
    (model / "cm3leon.json").unlink()
    if content is not None:
        (model / "cm3leon.json").write_text(content)
    done = call_tool("generate", "image", "a", "--model", model, "--output", tmp_path / "out")
    assert done.returncode == 2 and fault in done.stderr and "export the checkpoint again" in done.stderr


def test_images(world):
    out = world / "images"
    options = ["--model", world / "exported", "--guidance", 2, "--seed", 4, "--candidates", 2]
    done = make("generate", "image", "a red picture", "a blue one", *options, "--output", out)
    assert f"wrote 4 images, contact_sheet.png and generated.json to {out}" in done.stdout
    assert "64/64 tokens" in done.stdout
    made = read_results(out)["made"]
    assert [(one["caption"], one["seed"]) for one in made] == [
        ("a red picture", 4), ("a red picture", 5), ("a blue one", 4), ("a blue one", 5)]  # fmt: skip
    for one in made:
        with Image.open(out / one["picture"]) as picture:
            assert picture.size == (16, 16)
        assert len(one["codes"]) == 16 and max(one["codes"]) < 8
    assert (out / "contact_sheet.png").is_file()
    assert read_results(out)["sampler"] == "gumbel-1"
    alone = world / "alone"
    make("generate", "image", "a blue one", *options, "--output", alone)
    assert read_results(alone)["made"][0]["codes"] == made[2]["codes"]
    make("generate", "image", "a blue one", *options, "--sampler", "inverse-1", "--output", world / "inverse")
    inverse = read_results(world / "inverse")
    assert inverse["sampler"] == "inverse-1" and inverse["made"][0]["codes"] != made[2]["codes"]
    again = call_tool("generate", "image", "a", "--model", world / "exported", "--output", out)
    assert again.returncode == 2 and "holds the results of an earlier call" in again.stderr


def test_captions(world):
    done = make("generate", "caption", world / "0.png", world / "1.png", "--model", world / "exported",
                "--output", world / "captions")  # fmt: skip
    assert done.stdout.startswith(f"{world / '0.png'}: ")
    assert len(read_results(world / "captions")["made"]) == 2


def test_infilling(world):
    model = ["--model", world / "exported"]
    make("generate", "infill", *model, "--text", "a <mask> picture", "--output", world / "text")
    filled = read_results(world / "text")["made"][0]["filled"]
    assert filled.startswith("a") and filled.endswith(" picture")
    box = ["--image", world / "0.png", "--box", 1, 0, 3, 4]
    done = make("generate", "infill", *model, *box, "--caption", "a red picture", "--output", world / "box")
    assert f"wrote 2 images, contact_sheet.png and generated.json to {world / 'box'}" in done.stdout
    results = read_results(world / "box")
    made = results["made"][0]
    assert made["picture"] == "001.png" and results["options"]["picture"] == str(world / "0.png")
    old = ["--picture", *box[1:]]  # the old name of --image
    make("generate", "infill", *model, *old, "--caption", "a red picture", "--output", world / "old name")
    assert read_results(world / "old name")["made"] == results["made"]
    before = Tokenizers.load(world / "exported")
    codes = before.image.encode(to_pixels(load_image(world / "0.png"), 16)[None])[0].tolist()
    assert made["codes"][:4] == codes[:4] and made["codes"][12:] == codes[12:]


def test_retrieved_documents_stand_in_front(world):
    make("preprocess_data", "--input", world / "pairs.jsonl", "--tokenizer", world / "exported",
         "--output", world / "shards", "--workers", 1)  # fmt: skip
    make("train_clip", "--input", world / "pairs.jsonl", "--text-model", world / "exported/text.model",
         "--output", world / "clip", "--steps", 2, "--batch-size", 8)  # fmt: skip
    make("build_index", "--shards", world / "shards", "--encoder", world / "clip", "--output", world / "index")
    options = ["--model", world / "exported", "--retrieve", world / "index", "--documents", 2, "--temperature", 0]
    make("generate", "image", "a red picture", *options, "--output", world / "retrieved")
    made = read_results(world / "retrieved")["made"][0]
    assert len(made["retrieved"]) <= 2
    ranked = ["--candidates", 3, "--rank-with", world / "clip", "--keep", 2, "--output", world / "ranked"]
    make("generate", "image", "a red picture", "a blue picture", *options[:2], *ranked)
    made = read_results(world / "ranked")["made"]
    assert [one["caption"] for one in made] == ["a red picture"] * 2 + ["a blue picture"] * 2
    assert made[0]["score"] >= made[1]["score"]
    given = ["--document", "a red picture", world / "0.png", "--temperature", 0, "--output", world / "given"]
    make("generate", "image", "a red picture", *options[:2], *given)
    again = call_tool("generate", "image", "a", *options, *given[:-1], world / "new")
    assert again.returncode == 2 and "give either --document or --retrieve" in again.stderr


def test_answers_and_documents(world):
    model = ["--model", world / "exported"]
    done = make("generate", "ask", world / "0.png", "what colour?", "and where?", *model, "--output", world / "asked")
    assert done.stdout.startswith("what colour?")
    assert [one["question"] for one in read_results(world / "asked")["made"]] == ["what colour?", "and where?"]
    parts = ["a red picture", f"@{world / '0.png'}", "a blue"]
    drawn = ["--text-temperature", 2, "--segments", 3, "--longest", 8, "--seed", 2, "--dtype", "int8"]
    make("generate", "complete", *parts, *model, *drawn, "--output", world / "completed")
    made = read_results(world / "completed")["made"]
    assert 1 <= len(made) <= 3 and "text" in made[0]
    for one in made[1:]:
        assert "text" in one or (world / "completed" / one["picture"]).is_file()


def test_a_text_that_begins_with_an_at_sign(world):
    model, generator = world / "exported", Generator.load(world / "exported")
    greedy = Sampling(temperature=0.0)
    options = CompletionOptions(text=greedy, image=Sampling(temperature=0.7), segments=1, longest=4)
    for written, text in (("@@nasa shows", "@nasa shows"), ("@@", "@"), ("@@@", "@@"), ("nasa @home", "nasa @home")):
        folder = world / f"at {written}"
        make("generate", "complete", written, "--model", model, "--segments", 1, "--longest", 4, "--output", folder)
        made = read_results(folder)["made"]
        assert made == [{"text": part} for part in generator.complete([[text]], options)[0]]
    make("generate", "image", "@nasa shows", "--model", model, "--output", world / "at image")
    assert read_results(world / "at image")["made"][0]["caption"] == "@nasa shows"
    for part in ("@nasa shows", "@", f"@{world / 'pairs.jsonl'}", "@" + "long " * 99):
        refused = call_tool("generate", "complete", part, "--model", model, "--output", world / "at none")
        assert refused.returncode == 2 and not (world / "at none").exists()
        assert f"error: '{part}' begins with @ and so names an image file. " in refused.stderr
        assert refused.stderr.endswith(". If it is a text, begin it with @@.\n")
    assert "@@ begins a text" in make("generate", "complete", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["image", "a", "--model", "{world}", "--output", "{world}/new"],
            "is not an exported model: it has no config.json",
        ),
        (["image", "a", "--model", "{model}", "--temperature", "-1", "--output", "{world}/new"], "temperature (-1.0)"),
        (["image", "long " * 200, "--model", "{model}", "--output", "{world}/new"], "the model's context has 128"),
        (["image", "--model", "{model}", "--output", "{world}/new"], "there are no captions"),
        (["image", "--from", "{world}/none.txt", "--model", "{model}"], "none.txt: No such file"),
        (["image", "--from", "{world}/0.png", "--model", "{model}"], "not UTF-8: byte 0 of --from"),
        (["image", "a\udcff", "--model", "{model}", "--output", "{world}/new"], "is not valid Unicode"),
        (
            ["image", "a", "--model", "{model}", "--device", "gpu", "--output", "{world}/new"],
            "is not a valid torch device",
        ),
        (["image", "a", "--model", "{model}", "--documents", "1", "--output", "{world}/new"], "are for --retrieve"),
        (
            ["image", "a", "--model", "{model}", "--rank-with", "{model}", "--output", "{world}/new"],
            "'opt', not 'clip'",
        ),
        (["caption", "{world}/none.png", "--model", "{model}"], "none.png: no such file"),
        (["caption", "{world}/pairs.jsonl", "--model", "{model}"], "not an image but a text that begins with"),
        (
            ["image", "a", "", "--model", "{model}", "--output", "{world}/new"],
            "caption 1 is empty: guidance and contrast_k need a condition",
        ),
        (
            ["image", "a", "--model", "{model}", "--guidance", "2", "--contrast-k", "3", "--output", "{world}/new"],
            "both contrast with the prompt without its condition; give one of them",
        ),
        (
            ["image", "a", "--model", "{model}", "--keep", "1", "--output", "{world}/new"],
            "keep (1) requires an encoder",
        ),
        (
            ["infill", "--text", "a <mask>", "--guidance", "2", "--model", "{model}", "--output", "{world}/new"],
            "--text takes neither",
        ),
        (
            [
                "infill",
                "--picture",
                "{world}/0.png",
                "--box",
                "0",
                "0",
                "1",
                "1",
                "--guidance",
                "2",
                "--model",
                "{model}",
                "--output",
                "{world}/new",
            ],
            "guidance (2.0) requires captions",
        ),
        (["complete", "@{world}/none.png", "--model", "{model}", "--output", "{world}/new"], "none.png: no such file"),
        (["infill", "--text", "no hole", "--model", "{model}"], "must contain <mask> exactly once"),
        (["infill", "--model", "{model}"], 'give either --text "... <mask> ..."'),
        (["infill", "--box", "0", "0", "1", "1", "--model", "{model}"], "--box requires the --image"),
        (
            ["infill", "--picture", "{world}/0.png", "--box", "0", "0", "9", "1", "--model", "{model}"],
            "must be within the image's 4 rows and 4 columns",
        ),
    ],
)
def test_errors_are_sentences(world, arguments, message):
    filled = [text.format(world=world, model=world / "exported") for text in arguments]
    done = call_tool("generate", *filled)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not (world / "new").exists() and not list(world.glob(".new*"))
