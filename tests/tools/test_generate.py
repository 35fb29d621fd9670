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

COLORS = {"red": (220, 0, 0), "green": (0, 150, 30), "blue": (0, 30, 235)}


def run_tool(name, *arguments):
    """Call a tool that must succeed."""
    done = call_tool(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generation")
    pairs = []
    for number in range(24):
        color = list(COLORS)[number % 3]
        pixels = np.full((16, 16, 3), COLORS[color], np.uint8)
        pixels[number % 16] = 255
        Image.fromarray(pixels).save(path / f"{number}.png")
        pairs.append({"image": f"{number}.png", "caption": f"a {color} picture with a white line"})
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    specials = ["--specials", 16, "--sentinels", 4]
    tok = path / "exported"
    run_tool(
        "train_tokenizer", "text", "--input", path / "pairs.jsonl", "--vocab-size", 290, "--output", tok, *specials
    )
    run_tool("train_tokenizer", "image", "--input", path / "pairs.jsonl", "--image-size", 16, "--downsample", 4,
             "--codebook-size", 8, "--steps", 2, "--warmup-steps", 1, "--output", tok, *specials)  # fmt: skip
    save_random_opt(tok, Tokenizers.load(tok).vocabulary, positions=128, init_std=0.2)
    (tok / "cm3leon.json").write_text('{"training": {}}')
    return path


def read_results(output):
    return json.loads((output / "generated.json").read_text())


def test_captions_of_a_file_give_the_same_images_as_those_of_the_command_line(folder):
    (folder / "captions.txt").write_bytes(b"a blue one\r\n\n \na green one\n")
    options = ["--model", folder / "exported", "--output"]
    run_tool("generate", "image", "a red one", "--from", folder / "captions.txt", *options, folder / "from file")
    run_tool("generate", "image", "a red one", "a blue one", "a green one", *options, folder / "from line")
    assert read_results(folder / "from file")["made"] == read_results(folder / "from line")["made"]
    assert read_results(folder / "from file")["options"]["guidance"] == 2.0


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{}", "KeyError"), ('{"tr', "cannot be read")])
def test_an_export_without_its_training_settings_is_refused(folder, tmp_path, content, message):
    model = shutil.copytree(folder / "exported", tmp_path / "model")
    (model / "cm3leon.json").unlink()
    if content is not None:
        (model / "cm3leon.json").write_text(content)
    done = call_tool("generate", "image", "a", "--model", model, "--output", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and "export the checkpoint again" in done.stderr


def test_images_are_generated_from_captions(folder):
    out = folder / "images"
    options = ["--model", folder / "exported", "--guidance", 2, "--seed", 4, "--candidates", 2]
    done = run_tool("generate", "image", "a red picture", "a blue one", *options, "--output", out)
    assert f"wrote 4 images, contact_sheet.png and generated.json to {out}" in done.stdout
    assert "64/64 tokens" in done.stdout
    generated = read_results(out)["made"]
    assert [(one["caption"], one["seed"]) for one in generated] == [
        ("a red picture", 4), ("a red picture", 5), ("a blue one", 4), ("a blue one", 5)]  # fmt: skip
    for one in generated:
        with Image.open(out / one["picture"]) as image:
            assert image.size == (16, 16)
        assert len(one["codes"]) == 16 and max(one["codes"]) < 8
    assert (out / "contact_sheet.png").is_file()
    assert read_results(out)["sampler"] == "gumbel-1"
    alone = folder / "alone"
    run_tool("generate", "image", "a blue one", *options, "--output", alone)
    assert read_results(alone)["made"][0]["codes"] == generated[2]["codes"]
    run_tool("generate", "image", "a blue one", *options, "--sampler", "inverse-1", "--output", folder / "inverse")
    inverse = read_results(folder / "inverse")
    assert inverse["sampler"] == "inverse-1" and inverse["made"][0]["codes"] != generated[2]["codes"]
    again = call_tool("generate", "image", "a", "--model", folder / "exported", "--output", out)
    assert again.returncode == 2 and "holds the results of an earlier call" in again.stderr


def test_images_are_captioned(folder):
    done = run_tool("generate", "caption", folder / "0.png", folder / "1.png", "--model", folder / "exported",
                    "--output", folder / "captions")  # fmt: skip
    assert done.stdout.startswith(f"{folder / '0.png'}: ")
    assert len(read_results(folder / "captions")["made"]) == 2


def test_text_and_images_are_infilled(folder):
    model = ["--model", folder / "exported"]
    run_tool("generate", "infill", *model, "--text", "a <mask> picture", "--output", folder / "text")
    filled = read_results(folder / "text")["made"][0]["filled"]
    assert filled.startswith("a") and filled.endswith(" picture")
    box = ["--image", folder / "0.png", "--box", 1, 0, 3, 4]
    done = run_tool("generate", "infill", *model, *box, "--caption", "a red picture", "--output", folder / "box")
    assert f"wrote 2 images, contact_sheet.png and generated.json to {folder / 'box'}" in done.stdout
    results = read_results(folder / "box")
    generated = results["made"][0]
    assert generated["picture"] == "001.png" and results["options"]["picture"] == str(folder / "0.png")
    old = ["--picture", *box[1:]]  # the former name of --image
    run_tool("generate", "infill", *model, *old, "--caption", "a red picture", "--output", folder / "old name")
    assert read_results(folder / "old name")["made"] == results["made"]
    tokenizers = Tokenizers.load(folder / "exported")
    codes = tokenizers.image.encode(to_pixels(load_image(folder / "0.png"), 16)[None])[0].tolist()
    assert generated["codes"][:4] == codes[:4] and generated["codes"][12:] == codes[12:]
    assert generated["form"] == "raster", "not a form that the training had"
    masked = ["--caption", "a red picture", "--form", "masked", "--output", folder / "masked"]
    run_tool("generate", "infill", *model, *box, *masked)
    [other] = read_results(folder / "masked")["made"]
    assert other["form"] == "masked" and other["codes"] != generated["codes"]
    assert other["codes"][:4] == codes[:4] and other["codes"][12:] == codes[12:]


def test_retrieved_documents_precede_the_caption(folder):
    run_tool("preprocess_data", "--input", folder / "pairs.jsonl", "--tokenizer", folder / "exported",
             "--output", folder / "shards", "--workers", 1)  # fmt: skip
    run_tool("train_clip", "--input", folder / "pairs.jsonl", "--text-model", folder / "exported/text.model",
             "--output", folder / "clip", "--steps", 2, "--batch-size", 8)  # fmt: skip
    run_tool("build_index", "--shards", folder / "shards", "--encoder", folder / "clip", "--output", folder / "index")
    options = ["--model", folder / "exported", "--retrieve", folder / "index", "--documents", 2, "--temperature", 0]
    run_tool("generate", "image", "a red picture", *options, "--output", folder / "retrieved")
    generated = read_results(folder / "retrieved")["made"][0]
    assert len(generated["retrieved"]) <= 2
    ranked = ["--candidates", 3, "--rank-with", folder / "clip", "--keep", 2, "--output", folder / "ranked"]
    run_tool("generate", "image", "a red picture", "a blue picture", *options[:2], *ranked)
    generated = read_results(folder / "ranked")["made"]
    assert [one["caption"] for one in generated] == ["a red picture"] * 2 + ["a blue picture"] * 2
    assert generated[0]["score"] >= generated[1]["score"]
    given = ["--document", "a red picture", folder / "0.png", "--temperature", 0, "--output", folder / "given"]
    run_tool("generate", "image", "a red picture", *options[:2], *given)
    again = call_tool("generate", "image", "a", *options, *given[:-1], folder / "new")
    assert again.returncode == 2 and "give either --document or --retrieve" in again.stderr


def test_questions_are_answered_and_documents_completed(folder):
    model = ["--model", folder / "exported"]
    done = run_tool(
        "generate", "ask", folder / "0.png", "what colour?", "and where?", *model, "--output", folder / "asked"
    )
    assert done.stdout.startswith("what colour?")
    assert [one["question"] for one in read_results(folder / "asked")["made"]] == ["what colour?", "and where?"]
    parts = ["a red picture", f"@{folder / '0.png'}", "a blue"]
    options = ["--text-temperature", 2, "--segments", 3, "--longest", 8, "--seed", 2, "--dtype", "int8"]
    run_tool("generate", "complete", *parts, *model, *options, "--output", folder / "completed")
    generated = read_results(folder / "completed")["made"]
    assert 1 <= len(generated) <= 3 and "text" in generated[0]
    for one in generated[1:]:
        assert "text" in one or (folder / "completed" / one["picture"]).is_file()


def test_a_text_that_begins_with_an_at_sign(folder):
    model, generator = folder / "exported", Generator.load(folder / "exported")
    greedy = Sampling(temperature=0.0)
    options = CompletionOptions(text=greedy, image=Sampling(temperature=0.7), segments=1, longest=4)
    for written, text in (("@@nasa shows", "@nasa shows"), ("@@", "@"), ("@@@", "@@"), ("nasa @home", "nasa @home")):
        output = folder / f"at {written}"
        run_tool("generate", "complete", written, "--model", model, "--segments", 1, "--longest", 4, "--output", output)
        generated = read_results(output)["made"]
        assert generated == [{"text": part} for part in generator.complete([[text]], options)[0]]
    run_tool("generate", "image", "@nasa shows", "--model", model, "--output", folder / "at image")
    assert read_results(folder / "at image")["made"][0]["caption"] == "@nasa shows"
    for part in ("@nasa shows", "@", f"@{folder / 'pairs.jsonl'}", "@" + "long " * 99):
        refused = call_tool("generate", "complete", part, "--model", model, "--output", folder / "at none")
        assert refused.returncode == 2 and not (folder / "at none").exists()
        assert f"error: '{part}' begins with @ and so names an image file. " in refused.stderr
        assert refused.stderr.endswith(". If it is a text, begin it with @@.\n")
    assert "@@ begins a text" in run_tool("generate", "complete", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["image", "a", "--model", "{folder}", "--output", "{folder}/new"],
            "is not an exported model: it has no config.json",
        ),
        (["image", "a", "--model", "{model}", "--temperature", "-1", "--output", "{folder}/new"], "temperature (-1.0)"),
        (["image", "long " * 200, "--model", "{model}", "--output", "{folder}/new"], "the model's context has 128"),
        (["image", "--model", "{model}", "--output", "{folder}/new"], "there are no captions"),
        (["image", "--from", "{folder}/none.txt", "--model", "{model}"], "none.txt: No such file"),
        (["image", "--from", "{folder}/0.png", "--model", "{model}"], "not UTF-8: byte 0 of --from"),
        (["image", "a\udcff", "--model", "{model}", "--output", "{folder}/new"], "is not valid Unicode"),
        (
            ["image", "a", "--model", "{model}", "--device", "gpu", "--output", "{folder}/new"],
            "is not a valid torch device",
        ),
        (["image", "a", "--model", "{model}", "--documents", "1", "--output", "{folder}/new"], "are for --retrieve"),
        (
            ["image", "a", "--model", "{model}", "--rank-with", "{model}", "--output", "{folder}/new"],
            "'opt', not 'clip'",
        ),
        (["caption", "{folder}/none.png", "--model", "{model}"], "none.png: no such file"),
        (["caption", "{folder}/pairs.jsonl", "--model", "{model}"], "not an image but a text that begins with"),
        (
            ["image", "a", "", "--model", "{model}", "--output", "{folder}/new"],
            "caption 1 is empty: guidance and contrast_k need a condition",
        ),
        (
            ["image", "a", "--model", "{model}", "--guidance", "2", "--contrast-k", "3", "--output", "{folder}/new"],
            "both contrast with the prompt without its condition; give one of them",
        ),
        (
            ["image", "a", "--model", "{model}", "--keep", "1", "--output", "{folder}/new"],
            "keep (1) requires an encoder",
        ),
        (
            ["infill", "--text", "a <mask>", "--guidance", "2", "--model", "{model}", "--output", "{folder}/new"],
            "--text takes neither",
        ),
        (
            ["infill", "--text", "a <mask>", "--form", "raster", "--model", "{model}", "--output", "{folder}/new"],
            "--form (raster) is for an image with --box; a text is always masked: remove it.",
        ),
        (
            [
                "infill",
                "--picture",
                "{folder}/0.png",
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
                "{folder}/new",
            ],
            "guidance (2.0) requires captions",
        ),
        (
            ["complete", "@{folder}/none.png", "--model", "{model}", "--output", "{folder}/new"],
            "none.png: no such file",
        ),
        (["infill", "--text", "no hole", "--model", "{model}"], "must contain <mask> exactly once"),
        (["infill", "--model", "{model}"], 'give either --text "... <mask> ..."'),
        (["infill", "--box", "0", "0", "1", "1", "--model", "{model}"], "--box requires the --image"),
        (
            ["infill", "--picture", "{folder}/0.png", "--box", "0", "0", "9", "1", "--model", "{model}"],
            "must be within the image's 4 rows and 4 columns",
        ),
    ],
)
def test_errors_are_readable(folder, arguments, message):
    filled = [text.format(folder=folder, model=folder / "exported") for text in arguments]
    done = call_tool("generate", *filled)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not (folder / "new").exists() and not list(folder.glob(".new*"))
