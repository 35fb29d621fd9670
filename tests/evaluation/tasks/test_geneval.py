"""The task geneval: GenEval's folder, the score by a checker, an interrupted run."""

import json
import shutil

import pytest
from PIL import Image

from megatron_cm3leon.evaluation.tasks import geneval
from megatron_cm3leon.evaluation.tasks.geneval import evaluate
from tests.evaluation.conftest import CHECKER
from tests.evaluation.rank_threads import run_ranks

FINDER = """
def find_objects(image):
    side = image.width
    return [{"name": classify(image)["tone"], "color": "grey", "box": (0, 0, side, side)}]
"""
PROMPTS = [
    {"tag": tag, "prompt": prompt, "include": [{"class": name, "count": 1}]}
    for tag, prompt, name in (
        ("single_object", "a dark picture", "dark"),
        ("single_object", "a light picture", "light"),
        ("counting", "a light", "light"),
    )
]


@pytest.fixture
def arguments(inputs):
    inputs.checker.write_text(CHECKER + FINDER)
    prompts = inputs.path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return {"model": inputs.model, "prompts": prompts, "checker": inputs.checker, "output": inputs.path / "out",
            "images": 2, "device": "cpu"}  # fmt: skip


def read_images(output):
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in sorted(output.rglob("*.png"))}


def test_folder_and_score(arguments):
    result = evaluate(**arguments)
    images = arguments["output"] / "images"
    assert sorted(path.name for path in images.iterdir()) == ["00000", "00001", "00002"]
    assert [json.loads((images / f"0000{n}/metadata.jsonl").read_text()) for n in range(3)] == PROMPTS
    assert len(read_images(images)) == 3 * 2
    correct = []
    for number, prompt in enumerate(PROMPTS):
        for sample in range(2):
            image = Image.open(images / f"0000{number}/samples/000{sample}.png").convert("L")
            tone = "light" if sum(image.tobytes()) > 4 * 128 else "dark"
            correct.append(tone == prompt["include"][0]["class"])
    single, counting = sum(correct[:4]) / 4, sum(correct[4:]) / 2
    assert result.figures["single_object"].value == single and result.figures["counting"].value == counting
    assert result.figures["score"].value == pytest.approx((single + counting) / 2)
    assert result.figures["score"].n == 3 and result.figures["correct_images"].value == sum(correct) / 6


def test_an_interrupted_run_continues_with_the_same_images(arguments, monkeypatch):
    monkeypatch.setattr(geneval, "PROMPTS_AT_ONCE", 2)
    evaluate(**arguments)
    before = read_images(arguments["output"])
    shutil.rmtree(arguments["output"] / "images/00001")
    kept = (arguments["output"] / "images/00002/samples/0000.png").stat().st_mtime_ns
    result = evaluate(**arguments | {"checker": None})
    assert read_images(arguments["output"]) == before
    assert (arguments["output"] / "images/00002/samples/0000.png").stat().st_mtime_ns == kept
    assert result.figures["images"].value == 6 and "evaluate_images.py" in result.notes[0]
    with pytest.raises(ValueError, match="of a run with another seed"):
        evaluate(**arguments | {"seed": 1})


def test_ranks_write_the_same_images(arguments, monkeypatch):
    monkeypatch.setattr(geneval, "PROMPTS_AT_ONCE", 1)
    alone = evaluate(**arguments)
    output = arguments["output"].with_name("shared")
    result, other = run_ranks(2, lambda ranks: evaluate(**arguments | {"output": output, "ranks": ranks}))
    assert result == alone and other is None
    assert read_images(output) == read_images(arguments["output"]) and len(read_images(output)) == 6


def test_a_checker_without_find_objects_is_refused(arguments):
    arguments["checker"].write_text(CHECKER)
    with pytest.raises(ValueError, match="has no function find_objects"):
        evaluate(**arguments)
