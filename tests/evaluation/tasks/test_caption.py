"""The task caption: figures of files, captions of a model with and without retrieved documents, bad input."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.data.shards.reader import build_manifest
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.evaluation import caption_scores
from megatron_cm3leon.evaluation.metrics.ptb_tokenizer import tokenize
from megatron_cm3leon.evaluation.result import read_result
from megatron_cm3leon.evaluation.tasks import caption
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.generation.sampling import Sampling
from tests.evaluation.conftest import VOCABULARY
from tests.tools.call import call_tool

OWN = ["bleu", "cider", "rouge"]
CAPTIONS = {"1": "A dog's red ball.", "2": "two cats, sitting on a mat", "3": "the sea", "4": ""}
REFERENCES = {
    "1": ["A red ball of a dog", "the dog's ball is red"],
    "2": ["Two cats sit on a mat."],
    "3": ["the blue sea", "waves", "A beach!"],
    "4": ["nothing (at all)"],
}


@pytest.fixture
def files(tmp_path):
    results = [{"image_id": int(key), "caption": text} for key, text in CAPTIONS.items()]
    (tmp_path / "results.json").write_text(json.dumps(results))
    lines = [json.dumps({"image_id": key, "captions": texts}) for key, texts in REFERENCES.items()]
    (tmp_path / "references.jsonl").write_text("\n".join(lines))
    return tmp_path


def evaluate_files(folder, **options):
    options = {"captions": folder / "results.json", "references": folder / "references.jsonl", **options}
    return caption.evaluate(output=folder / "out", **{"metrics": OWN, **options})


def test_a_file_is_scored_as_pycocoevalcap_does(files):
    result = evaluate_files(files)
    joined = {key: [" ".join(tokenize(text)) for text in texts] for key, texts in REFERENCES.items()}
    captions = {key: [" ".join(tokenize(text))] for key, text in CAPTIONS.items()}
    bleu = Bleu(4).compute_score(joined, captions, verbose=0)[0]
    cider, per_image = Cider().compute_score(joined, captions)
    figures = result.figures
    assert [figures[f"bleu-{n}"].value for n in (1, 2, 3, 4)] == pytest.approx([100 * each for each in bleu])
    assert figures["cider-d"].value == pytest.approx(100 * cider) and figures["cider-d"].n == 4
    assert figures["cider-d"].low < figures["cider-d"].value < figures["cider-d"].high
    assert [one["cider-d"] for one in result.tables["examples"]] == pytest.approx(100 * per_image, abs=0.01)
    assert set(result.inputs) == {"captions", "references"} and result.settings["tokenizer"] == "python"
    assert "1 of 4 captions have no words; their scores are 0." in result.notes and caption.CIDER_NOTE in result.notes


def test_an_interval_keeps_the_document_frequencies(files):
    """It is the interval of the mean of per-image scores, which one set of references gave."""
    figure = evaluate_files(files, metrics=["cider"]).figures["cider-d"]
    rows = caption_scores.score_captions(list(CAPTIONS.values()), list(REFERENCES.values()), ["cider"]).rows["cider-d"]
    random = np.random.default_rng(0)
    means = [np.mean(np.array(rows)[random.integers(0, 4, 4)]) for _ in range(1000)]
    assert [figure.low, figure.high] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())


def test_metrics_that_cannot_run_are_named_in_one_note(files, monkeypatch):
    reason = "x.jar is not in /y"
    monkeypatch.setattr(caption_scores, "explain_missing", lambda name: reason)
    result = evaluate_files(files, metrics=[*OWN, "meteor", "spice"])
    assert "meteor and spice are off: x.jar is not in /y." in result.notes and "meteor" not in result.figures
    with pytest.raises(ValueError, match=r"^spice is off: x.jar is not in /y.$"):
        evaluate_files(files, metrics=["spice"])
    with pytest.raises(ValueError, match=r"--tokenizer java cannot run: x.jar is not in /y"):
        evaluate_files(files, tokenizer="java")


def test_one_image_has_no_cider_and_no_interval(files):
    for name, text in (("results.json", '[{"image_id": 2, "caption": "two cats"}]'),
                       ("references.jsonl", '{"image_id": 2, "caption": "two cats"}')):  # fmt: skip
        (files / name).write_text(text)
    result = evaluate_files(files)
    assert "cider-d" not in result.figures and result.figures["rouge-l"].value == pytest.approx(100)
    assert result.figures["rouge-l"].low is None and result.figures["rouge-l"].n == 1
    assert any("cider is off: its weights are 0 in a set of one image" in note for note in result.notes)
    with pytest.raises(ValueError, match="cider is off"):
        evaluate_files(files, metrics=["cider"])


def test_images_without_captions_are_skipped_if_allowed(files):
    (files / "results.json").write_text('[{"image_id": 2, "caption": "two cats"}, {"image_id": 1, "caption": "dog"}]')
    with pytest.raises(ValueError, match=r"2 of 4 images have no caption \(3, 4\)"):
        evaluate_files(files)
    result = evaluate_files(files, allow_missing=True)
    assert result.figures["cider-d"].n == 2 and "2 of 4 images have no caption and are not scored." in result.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --captions FILE to score it, or --model FOLDER"),
        ({"captions": "a", "model": "b"}, "give either --captions FILE"),
        ({"captions": "a"}, "--captions needs --references FILE"),
        ({"captions": "a", "references": "b", "shards": "c", "count": 3}, "--shards and --count are for --model"),
        ({"model": "a"}, "--model needs either --shards FOLDER or --images FILE"),
        ({"model": "a", "shards": "b", "images": "c"}, "--model needs either --shards FOLDER or --images FILE"),
        ({"model": "a", "shards": "b", "documents": 2}, "--documents is for --index, to retrieve from"),
        ({"model": "a", "images": "none.jsonl"}, "there is no file at none.jsonl"),
        ({"model": "a", "shards": "b", "allow_missing": True}, "--allow-missing is for --captions"),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        caption.evaluate(output=tmp_path, metrics=OWN, **options)


def test_a_model_captions_shards_with_and_without_documents(inputs, monkeypatch):
    source = inputs.source
    monkeypatch.setattr(DocumentSource, "load", classmethod(lambda *_: source))
    options = {"model": inputs.model, "shards": inputs.shards, "metrics": OWN, "longest": 4, "batch_size": 5}
    plain = caption.evaluate(output=inputs.path / "plain", **options)
    with_documents = caption.evaluate(output=inputs.path / "with", index=inputs.bank, documents=2, **options)
    pairs = caption.open_images(inputs.shards, None, None)
    keys = list(pairs.references)
    rows = json.loads((inputs.path / "plain" / "captions.json").read_text())
    expected = inputs.generator.captions(pairs.load_inputs(keys), Sampling(temperature=0), longest=4)
    assert rows == [{"image_id": key, "caption": text} for key, text in zip(keys, expected, strict=True)]
    assert plain.settings["documents"] == 0 and with_documents.settings["documents"] == 2
    retrieved = inputs.generator.captions(
        pairs.load_inputs(keys), Sampling(temperature=0), longest=4, retrieved=source.read([[1, 0]] * len(keys))
    )
    lines = [json.loads(line) for line in (inputs.path / "with/items.jsonl").read_text().splitlines()[1:]]
    assert [line["item"] for line in lines] == [{"caption": text, "retrieved": [1, 0]} for text in retrieved]
    assert {"model", "index", "shards"} == set(with_documents.inputs) and plain.figures["cider-d"].n == len(keys)
    # In a short context the documents do not fit together with a long caption.
    short = caption.evaluate(output=inputs.path / "short", index=inputs.bank, documents=2, **{**options, "longest": 30})
    note = (
        f"{len(keys)} of {len(keys)} images had fewer than 2 retrieved documents: the context of 40 tokens has no room"
    )
    assert any(each.startswith(note) for each in short.notes)
    with pytest.raises(ValueError, match=r"is the memory bank of .* so each image would retrieve its own"):
        caption.evaluate(output=inputs.path / "own", index=inputs.bank, **{**options, "shards": inputs.bank})


def test_references_of_the_input_replace_the_caption_of_training(tmp_path):
    rows = [("a dark picture", {"references": ["dark", "a dark tone"], "license": "MIT"}, 0),
            ("dark: a picture", {"references": ["dark", "night"]}, 0),
            ("a light picture", {}, 1),
            ("a picture", {"references": "see [1]"}, 2)]  # fmt: skip
    writer = ShardWriter(tmp_path, "shard-00000-0", VOCABULARY)
    for number, (text, extra, code) in enumerate(rows):
        fields = {"caption": text, "image": "", "source": "", "picture_sha256": "", "extra": json.dumps(extra)}
        ids = [0, VOCABULARY.break_id, *[VOCABULARY.image_start + code] * 4]
        writer.add(f"{number:06d}", np.array(ids), fields)
    write_json(tmp_path / "manifest.json", build_manifest(VOCABULARY, [writer.close()], input=str(tmp_path)))
    images = caption.open_images(tmp_path, None, None)
    assert images.references == {
        "000000": ["dark", "a dark tone", "night"],
        "000002": ["a light picture"],
        "000003": ["a picture"],
    }


def test_documents_with_the_same_image_are_one_image(inputs):
    images = caption.open_images(inputs.shards, None, None)
    codes = [row.tobytes() for row in images.load_inputs(list(images.references))]
    assert len(set(codes)) == len(codes) and sum(map(len, images.references.values())) == 20


def test_an_interrupted_run_continues(inputs, monkeypatch):
    options = {"model": inputs.model, "shards": inputs.shards, "metrics": OWN, "longest": 4, "batch_size": 4}
    options["count"] = 10
    complete = caption.evaluate(output=inputs.path / "complete", **options)
    calls, original = [], inputs.generator.captions

    def interrupt(images, *arguments, **others):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(images))
        return original(images, *arguments, **others)

    monkeypatch.setattr(inputs.generator, "captions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        caption.evaluate(output=inputs.path / "out", **options)
    calls[:] = [0]
    continued = caption.evaluate(output=inputs.path / "out", **options)
    assert calls == [0, 2] and continued.figures == complete.figures and continued.tables == complete.tables
    with pytest.raises(ValueError, match="of a run with different settings; give another --output"):
        caption.evaluate(output=inputs.path / "out", **{**options, "longest": 5})


def test_a_model_captions_the_images_of_a_list(inputs):
    lines = []
    for number in range(3):
        Image.fromarray(np.full((2, 2), 36 * number, np.uint8)).save(inputs.path / f"{number}.png")
        lines.append({"image": f"{number}.png", "captions": ["a dark picture", "dark"]})
    path = inputs.path / "images.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    options = {"model": inputs.model, "images": path, "metrics": OWN, "longest": 4}
    result = caption.evaluate(output=inputs.path / "out", **options)
    assert result.figures["rouge-l"].n == 3 and set(result.inputs) == {"model", "images"}
    assert [each["image"] for each in result.tables["examples"]] == ["0.png", "1.png", "2.png"]
    references = inputs.path / "references.jsonl"
    references.write_text('{"id": "0.png", "caption": "a"}')
    with pytest.raises(ValueError, match=r"2 of 3 images have no references in .*, the first is '1.png'"):
        caption.evaluate(output=inputs.path / "other", references=references, **options)
    (inputs.path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images of .*images.jsonl do not exist, the first is .*1.png"):
        caption.evaluate(output=inputs.path / "other", **options)
    path.write_text('{"id": 1, "caption": "a"}')
    with pytest.raises(ValueError, match=r"1 of 1 entries of .* have no image, the first is '1'"):
        caption.evaluate(output=inputs.path / "other", **options)
    (inputs.path / "images.jsonl").write_text('{"image": "0.png", "caption": "dark"}')
    (inputs.path / "0.png").write_bytes((inputs.path / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"0.png: damaged PNG: .*; replace the file, and repeat the command, which"):
        caption.evaluate(output=inputs.path / "other", **options)
    with pytest.raises(ValueError, match=r"--count \(0\) must be at least 1"):
        caption.evaluate(output=inputs.path / "other", count=0, **{**options, "images": None, "shards": inputs.shards})


def test_the_command(files):
    command = ["evaluate", "caption", "--captions", files / "results.json", "--output", files / "out"]
    done = call_tool(*command, "--references", files / "references.jsonl", "--metrics", *OWN)
    assert done.returncode == 0, done.stderr
    assert "cider-d: " in done.stdout and "n = 4" in done.stdout
    assert read_result(files / "out" / "caption.json").figures["bleu-4"].unit == "x 100"
    done = call_tool(*command, "--references", files / "none.json", "--metrics", *OWN)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no file at ")
