"""tools/generate.py sheets: contact sheets of a run's newest checkpoint, one for each validation source."""

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.config.loading import save_config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation import sheets
from megatron_cm3leon.export import export_checkpoint
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.sampling import Sampling
from tests.checkpoint.builders import family_config, write_random_checkpoint, write_tokenizers
from tests.data.corpora import make_pairs, write_shards
from tests.tools.call import call_tool

SIZES = ("data.seq_length=64",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tok/, shards pairs/, mixed/ (pairs that begin with the image, and a text), texts/; run/ with two checkpoints."""
    folder = tmp_path_factory.mktemp("sheets")
    vocabulary = write_tokenizers(folder / "tok")
    write_shards(folder / "pairs", make_pairs(8, vocabulary, text=(4, 8)), vocabulary)
    swapped = []
    for ids in make_pairs(3, vocabulary, 1, text=(4, 8)):
        middle = len(ids) - vocabulary.image_tokens
        swapped.append(np.concatenate([ids[middle:], [vocabulary.break_id], ids[: middle - 1]]))
    write_shards(folder / "mixed", [*swapped, np.array([5, 6, 7])], vocabulary)
    write_shards(folder / "texts", [np.array([5, 6, 7])], vocabulary)
    sources = ", ".join(f"{{name: {name}, shards: {folder / name}}}" for name in ("mixed", "texts"))
    shards = [f"data.shards={folder / 'pairs'}", f"validation.shards={folder / 'pairs'}"]
    config = family_config(*SIZES, *shards, f"validation.sources=[{sources}]")
    for step in (2, 5):
        write_random_checkpoint(folder / "run", config, vocabulary, step=step)
    save_config(config, folder / "run" / "config.yaml")
    return folder


def test_each_source_has_a_sheet_of_what_the_export_generates(folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    drawn, draw_contact_sheet = [], sheets.draw_contact_sheet

    def record(images, labels, columns):
        drawn.append((images, labels))
        return draw_contact_sheet(images, labels, columns)

    monkeypatch.setattr(sheets, "draw_contact_sheet", record)
    arguments = ["--tokenizer", folder / "tok", "--output", folder / "out", "--pairs", 5, "--longest", 6, "--seed", 3]
    done = call_tool("generate", "sheets", "--run", folder / "run", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder / 'out/validation.png'}\nwrote {folder / 'out/mixed.png'}\n" in done.stdout
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["mixed.png", "validation.png"]
    assert "step-00000005" in caplog.text
    assert "mixed: skipped 1 documents that are not one text and one image\n" in caplog.text
    assert (
        "texts: skipped 1 documents that are not one text and one image, which are all; it has no sheet" in caplog.text
    )
    assert [len(images) for images, _ in drawn] == [10, 6]
    for name, (images, labels) in zip(("validation", "mixed"), drawn, strict=True):
        sheet = Image.open(folder / "out" / f"{name}.png")
        assert sheet.tobytes() == draw_contact_sheet(images, labels, 6).tobytes()

    exported = folder / "exported"
    export_checkpoint(folder / "run/checkpoints/step-00000005", folder / "tok", exported)
    generator = Generator.load(exported)
    expected = set()
    for number in range(3):
        image, text = sheets.split_segments(open_shards(folder / "mixed").read(number), generator.vocabulary)
        codes, words = image.astype(np.int64) - generator.vocabulary.image_start, generator.codec.text.decode(text)
        [caption] = generator.captions([codes], longest=6)
        [generated] = generator.images([words], Sampling(temperature=0.7, guidance=2.0, seed=3))
        [original] = generator.codec.decode_images([codes])
        expected.add((f"generated text: {caption}", original.tobytes()))
        expected.add((f"generated image: {words}", generated.image.tobytes()))
    images, labels = drawn[1]
    assert {(label, image.tobytes()) for label, image in zip(labels, images, strict=True)} == expected


@pytest.mark.parametrize(
    ("shards", "pairs", "message"),
    [
        (None, 2, "is not a run folder with a checkpoint; give the folder of a run's output=..."),
        ("pairs", 0, "--pairs (0) must be at least 1."),
        ("texts", 2, "have no document of one text and one image, which a sheet shows; add such a source"),
        ("", 2, "has no validation data, from which prompts are taken; set validation.sources or validation.shards."),
    ],
)
def test_what_cannot_be_drawn_is_refused(folder, tmp_path, shards, pairs, message):
    run = tmp_path / "run"
    if shards is not None:
        run.mkdir()
        (run / "checkpoints").symlink_to(folder / "run/checkpoints")
        held_out = [f"validation.shards={folder / shards}"] if shards else []
        save_config(family_config(*SIZES, *held_out), run / "config.yaml")
    arguments = ["--tokenizer", folder / "tok", "--output", tmp_path / "out", "--pairs", pairs]
    done = call_tool("generate", "sheets", "--run", run, *arguments)
    assert done.returncode == 2 and message in done.stderr
