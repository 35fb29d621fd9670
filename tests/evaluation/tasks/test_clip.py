"""The task clip: both formulas, truncated captions, best-of-N by another encoder, bad input."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.evaluation.result import read_result
from megatron_cm3leon.evaluation.tasks import clip
from megatron_cm3leon.retrieval.encoder import Encoder
from tests.evaluation.metrics.images import write_images
from tests.evaluation.rank_threads import run_ranks
from tests.evaluation.tasks.clips import CAPTIONS, write_clip
from tests.tools.call import call_tool


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two CLIP folders, three candidate folders of 12 images, and their captions; the last one is too long."""
    path = tmp_path_factory.mktemp("clip")
    for number, name in enumerate(("encoder", "ranker")):
        write_clip(path / name, seed=number)
    for candidate in range(3):
        write_images(path / "candidates" / str(candidate), 12, seed=candidate)
    captions = [*CAPTIONS[:11], "a red circle " * 60]
    lines = [json.dumps({"image": f"x/{number:03d}.png", "caption": text}) for number, text in enumerate(captions)]
    (path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return path, captions


def cosines(encoder, folder, captions):
    images = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    return (encoder.encode_texts(captions) * encoder.encode_images(images)).sum(axis=1)


@pytest.mark.parametrize(("formula", "factor"), [("torchmetrics", 100), ("hessel", 2.5)])
def test_the_score_is_the_named_formula(world, tmp_path, formula, factor):
    path, captions = world
    found = clip.evaluate(
        output=tmp_path,
        images=path / "candidates" / "0",
        captions=path / "captions.jsonl",
        encoder=path / "encoder",
        formula=formula,
    )
    expected = factor * cosines(Encoder.load(path / "encoder"), path / "candidates" / "0", captions).clip(0)
    figure = found.figures[f"clip-score-{formula}"]
    assert figure.value == pytest.approx(expected.mean(), rel=1e-4) and figure.n == 12
    assert figure.unit == found.settings["formula"] == f"{factor} * max(cos, 0)"
    assert "1 of 12 captions have more than 75 tokens and were truncated" in found.notes[0]


def test_a_truncated_caption_keeps_its_end_token(world):
    path, captions = world
    encoder = Encoder.load(path / "encoder")
    ids = encoder.tokenize([captions[-1]])[0]
    assert encoder.count_tokens(captions[-1]) > 75 and len(ids) == 77 and ids[-1] == encoder._end


def test_the_best_of_n_is_chosen_by_the_ranker_and_measured_by_the_encoder(world, tmp_path):
    path, captions = world
    options = {"images": path / "candidates", "captions": path / "captions.jsonl", "ranker": path / "ranker"}
    found = clip.evaluate(
        output=tmp_path / "out", encoder=path / "encoder", rank_folders=tmp_path / "ranked", **options
    )
    scores, ranks = (
        np.stack([cosines(Encoder.load(path / name), path / "candidates" / str(n), captions) for n in range(3)])
        for name in ("encoder", "ranker")
    )
    chosen = 100 * scores.clip(0)[ranks.argmax(axis=0), np.arange(12)]
    assert found.figures["clip-score-torchmetrics"].value == pytest.approx(100 * scores.clip(0).mean(), rel=1e-4)
    assert found.figures["clip-score-torchmetrics-best-of-3"].value == pytest.approx(chosen.mean(), rel=1e-4)
    for number, best in enumerate(ranks.argmax(axis=0)):
        name = f"{number:03d}.png"
        assert (tmp_path / "ranked" / "0" / name).read_bytes() == (path / "candidates" / str(best) / name).read_bytes()
    assert len(list((tmp_path / "ranked" / "2").iterdir())) == 12
    with pytest.raises(ValueError, match="are the same encoder; give another one to measure with"):
        clip.evaluate(output=tmp_path / "out2", encoder=path / "ranker", **options)


def test_an_interrupted_run_continues(world, tmp_path, monkeypatch):
    path, captions = world
    options = {"images": path / "candidates" / "0", "captions": path / "captions.jsonl", "encoder": path / "encoder"}
    whole = clip.evaluate(output=tmp_path / "whole", **options)
    encode, calls = Encoder.encode_texts, []

    def count(self, texts):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "encode_texts", count)
    with pytest.raises(KeyboardInterrupt):
        clip.evaluate(output=tmp_path / "out", batch_size=5, **options)
    found = clip.evaluate(output=tmp_path / "out", batch_size=5, **options)
    assert calls == [5, 5, 5, 2] and len(captions) == 12
    shared = run_ranks(2, lambda ranks: clip.evaluate(output=tmp_path / "two", batch_size=5, ranks=ranks, **options))
    assert shared == [found, None]
    figure = found.figures["clip-score-torchmetrics"].value
    assert figure == pytest.approx(whole.figures["clip-score-torchmetrics"].value, rel=1e-5)


def test_the_command_reads_texts_beside_images_and_refuses_bad_input_with_status_2(world, tmp_path):
    path, captions = world
    folder = write_images(tmp_path / "images", 3)
    for number in range(2):
        (folder / f"{number:03d}.txt").write_text(captions[number])
    done = call_tool("evaluate", "clip", "--images", folder, "--encoder", path / "encoder", "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "clip-score-torchmetrics: " in done.stdout and "1 images without a caption were not scored" in done.stdout
    found = read_result(tmp_path / "a" / "clip.json")
    assert [one["caption"] for one in found.tables["images"]] == captions[:2]
    scores = [float(one["note"].removeprefix("score ")) for one in found.tables["images"]]
    assert np.mean(scores) == pytest.approx(found.figures["clip-score-torchmetrics"].value, rel=1e-3)
    made = [{"picture": "000.png", "caption": "a red circle", "seed": 1}]
    (tmp_path / "generated.json").write_text(json.dumps({"made": made}))
    (tmp_path / "twice.jsonl").write_text('{"image": "000.png", "caption": "a"}\n' * 2)
    (tmp_path / "blank.jsonl").write_text('{"image": "000.png", "caption": " "}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "null.jsonl").write_text('\n{"image": "000.png", "caption": null}')
    (tmp_path / "latin.jsonl").write_bytes('{"image": "000.png", "caption": "caf\xe9"}\n'.encode("latin-1"))
    (tmp_path / "other.json").write_text("{}")
    for file, status, message in (
        (tmp_path / "generated.json", 0, ""),
        (path / "captions.jsonl", 2, "9 of 12 captions have no image in"),
        (tmp_path / "twice.jsonl", 2, "more than one caption of the image 000.png"),
        (tmp_path / "blank.jsonl", 2, "1 captions are blank, such as that of 000.png"),
        (tmp_path / "other.jsonl", 2, "other.jsonl:1: image (None) must be a text; give image and caption"),
        (tmp_path / "null.jsonl", 2, "null.jsonl:2: caption (None) must be a text"),
        (tmp_path / "latin.jsonl", 2, "latin.jsonl is not UTF-8: its byte 36 cannot be decoded; save it as UTF-8"),
        (tmp_path / "other.json", 2, "is not a generated.json of tools/generate.py"),
        (tmp_path / "absent.jsonl", 2, "is not a file; give JSON Lines"),
    ):
        options = ["--images", folder, "--encoder", path / "encoder", "--output", tmp_path / f"out-{file.name}"]
        done = call_tool("evaluate", "clip", *options, "--captions", file)
        assert done.returncode == status and message in done.stderr, file
        assert done.stderr.count("\n") <= 1
    options = ["--images", folder, "--encoder", path / "encoder", "--output", tmp_path / "b"]
    for more, message in (
        (["--ranker", path / "ranker"], "has no candidate folders 0..N-1"),
        (["--rank-folders", tmp_path / "x"], "requires --ranker"),
    ):
        done = call_tool("evaluate", "clip", *options, *more)
        assert done.returncode == 2 and message in done.stderr


def test_vectors_that_are_not_finite_are_refused(world, tmp_path, monkeypatch):
    path, _ = world
    monkeypatch.setattr(Encoder, "encode_images", lambda self, images: np.full((len(images), 32), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"encoder has vectors that are not finite numbers \(NaN\)"):
        clip.evaluate(
            output=tmp_path,
            images=path / "candidates" / "0",
            captions=path / "captions.jsonl",
            encoder=path / "encoder",
        )
