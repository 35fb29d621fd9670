"""The task vqa on a random model: official files in, figures and submissions out, by hand where that is possible."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.evaluation.answering import Answerer
from megatron_cm3leon.evaluation.questions.base import Question
from megatron_cm3leon.evaluation.result import read_result
from megatron_cm3leon.evaluation.tasks import vqa
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.generator import Generator
from tests.data.corpora import ByteText, make_vocabulary
from tests.evaluation.rank_threads import run_ranks
from tests.models import LevelTokenizer, save_random_opt
from tests.tools.call import call_tool

VOCABULARY = make_vocabulary(text=128, image=8, height=2, width=2, sentinels=2, specials=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of bytes and gray levels, and images 1 to 4 by the names of VQA, VizWiz, ScienceQA and VisDial."""
    path = tmp_path_factory.mktemp("world")
    save_random_opt(path / "model", VOCABULARY, hidden_size=16, positions=300)
    tokenizers = SimpleNamespace(text=ByteText(), image=LevelTokenizer(VOCABULARY), vocabulary=VOCABULARY)
    for number in range(1, 5):
        (path / f"test/{number}").mkdir(parents=True)
        image = Image.fromarray(np.full((2, 2), number * 36, np.uint8))
        for name in (f"COCO_val2014_{number:012d}.jpg", f"COCO_test2015_{number:012d}.jpg", f"{number}.png",
                     f"VisualDialog_val2018_{number:012d}.jpg", f"test/{number}/image.png"):  # fmt: skip
            image.save(path / name)
    with pytest.MonkeyPatch.context() as patch:
        generator = Generator(Decoder.load(path / "model"), tokenizers)
        patch.setattr(Generator, "load", classmethod(lambda *_: generator))
        yield SimpleNamespace(path=path, generator=generator)


def write(world, name, content):
    path = world.path / name
    lines = isinstance(content, list) and name.endswith(".jsonl")
    path.write_text("".join(json.dumps(one) + "\n" for one in content) if lines else json.dumps(content))
    return path


def run(world, name, *arguments):
    """Call the task, which has to succeed; its result and its submission."""
    out = world.path / name
    done = call_tool("evaluate", "vqa", "--model", world.path / "model", "--longest", 3, "--output", out, *arguments)
    assert done.returncode == 0, done.stderr
    return read_result(out / "vqa.json"), json.loads((out / "submission.json").read_text())


def refuse(world, *arguments):
    out = world.path / "refused"
    done = call_tool("evaluate", "vqa", "--model", world.path / "model", "--output", out, *arguments)
    assert done.returncode == 2 and not (out / "vqa.json").exists(), done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def write_vqa(world, subset="val2014", answers=lambda number: ["yes"] * 10):
    """Questions 10, 20 and 30 about images 1, 2 and 3, with annotations."""
    questions = [{"question_id": 10 * n, "image_id": n, "question": f"is it {n}?"} for n in (1, 2, 3)]
    annotations = [
        {"question_id": 10 * n, "image_id": n, "question_type": "is it", "answer_type": "yes/no" if n < 3 else "other",
         "answers": [{"answer": a, "raw_answer": f"{a}s", "answer_id": i} for i, a in enumerate(answers(n))]}
        for n in (1, 2, 3)
    ]  # fmt: skip
    header = {"data_type": "mscoco", "data_subtype": subset}
    return (
        write(world, f"questions-{subset}.json", header | {"questions": questions}),
        write(world, f"annotations-{subset}.json", header | {"annotations": annotations}),
    )


def test_free_answers_are_scored_by_the_official_rules(world):
    codes = world.generator.codec.encode_images([Image.open(world.path / f"{n}.png").convert("RGB") for n in (1, 2, 3)])
    given = world.generator.answers(list(codes), [f"is it {n}?" for n in (1, 2, 3)], longest=3)
    given = [answer.strip() for answer in given]
    # Question 1: two of ten people agree; 2: all ten do, but write it with a period; 3: nobody does.
    people = {
        1: [given[0]] * 2 + [f"other {n}" for n in range(8)],
        2: [f"{given[1]}."] * 10,
        3: [f"other {n}" for n in range(10)],
    }
    questions, annotations = write_vqa(world, answers=people.__getitem__)
    command = ["--format", "vqa", "--questions", questions, "--annotations", annotations]
    result, submission = run(world, "official", *command)
    assert submission == [{"question_id": 10 * n, "answer": given[n - 1]} for n in (1, 2, 3)]
    assert result.figures["accuracy"].value == pytest.approx(60 / 3) and result.figures["accuracy"].n == 3
    assert result.figures["accuracy_answer_type_yes/no"].value == pytest.approx(30)
    assert result.tables["groups"]["question_type"] == {"is it": {"accuracy": 20.0, "n": 3}}
    assert result.settings["normalizer"] == "official" and result.settings["stemmed"] is False
    assert set(result.inputs) == {"model", "questions", "annotations"}
    result, _ = run(world, "raw", *command, "--answers", "raw", "--stemmed")
    assert result.settings["stemmed"] == "Porter stems of both sides" and "snowballstemmer" in result.versions


def test_a_test_set_has_a_submission_and_no_figures(world):
    questions, _ = write_vqa(world, "test-dev2015")
    result, submission = run(world, "test-dev", "--format", "vqa", "--questions", questions)
    assert result.figures == {} and "the questions have no answers, so there are no figures." in result.notes
    assert [one["question_id"] for one in submission] == [10, 20, 30]


def test_vizwiz_and_scienceqa(world):
    people = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    vizwiz = [{"image": f"{n}.png", "question": "what?", "answers": people, "answer_type": "other"} for n in (1, 2)]
    result, submission = run(world, "vizwiz", "--format", "vizwiz", "--questions", write(world, "vizwiz.json", vizwiz))
    assert result.figures["accuracy"].value == 0 and [one["image"] for one in submission] == ["1.png", "2.png"]

    problem = {
        "question": "Which?",
        "choices": ["red", "blue"],
        "hint": "",
        "split": "test",
        "subject": "natural science",
    }
    problems = {
        "1": problem | {"answer": 0, "image": "image.png"},
        "2": problem | {"answer": 1, "image": None, "hint": "It is blue."},
        "3": problem | {"answer": 1, "image": None, "split": "train"},
    }
    command = ["--format", "scienceqa", "--questions", write(world, "problems.json", problems)]
    result, _ = run(world, "science", *command)
    assert "2 of 2 answers are not a letter of their options, and count as wrong." in result.notes
    letters, submission = run(world, "letters", *command, "--method", "rank")
    right = [one["answer"] == expected for one, expected in zip(submission, "AB", strict=True)]
    assert letters.figures["accuracy"].value == 50 * sum(right)
    assert letters.figures["accuracy_context_image"].value == 100 * right[0]
    texts, submission = run(world, "texts", *command, "--method", "rank", "--choices", "texts", "--length-normalized")
    assert {one["answer"] for one in submission} <= {"red", "blue"}
    assert texts.settings["score"] == "log-probability of the answer and <eoss> per token"
    assert "split ('val') must be one of" in refuse(world, *command, "--split", "val")


def test_candidates_are_ranked_after_the_prompt_of_free_answers(world, monkeypatch):
    """Against Generator.score with the prompt and the candidates written out in ids."""
    image, text = world.path / "2.png", world.generator.codec.text
    question = Question(key="1", text="what?", image=image, candidates=("red", "a gray one"))
    codes = world.generator.codec.encode_images([Image.open(image).convert("RGB")])[0] + VOCABULARY.image_start
    sentinel, end = VOCABULARY.sentinel(0), VOCABULARY.eoss
    before, pause = text.encode("Question: what? Answer:"), VOCABULARY.break_id
    prompt = [VOCABULARY.eos, *before, sentinel, *text.encode("."), pause, *codes.tolist(), VOCABULARY.eos, sentinel]
    targets = [[*text.encode(" red"), end], [*text.encode(" a gray one"), end]]
    expected = world.generator.score([prompt, prompt], targets)
    np.testing.assert_allclose(Answerer(world.generator).score([question])[0], expected, atol=1e-5)
    normalized = Answerer(world.generator, length_normalized=True).score([question])[0]
    np.testing.assert_allclose(normalized, expected / [5, 12], atol=1e-5)

    example = Question(key="x", text="which?", image=world.path / "1.png", answers=("blue", "gray", "gray"))
    document = world.generator.codec.encode_document(
        ["Question: which? Answer: gray.", Image.open(example.image).convert("RGB")]
    )
    shown = [VOCABULARY.eos, *document, pause, *prompt[1:]]
    [found] = Answerer(world.generator, [example], shots=1).score([question])
    np.testing.assert_allclose(found, world.generator.score([shown, shown], targets), atol=1e-5)

    read = []
    segments = "megatron_cm3leon.generation.generator.decode_segments"
    ids = np.array([[text.encode("a")[0], end]])
    monkeypatch.setattr(segments, lambda decoder, given, *rest: read.extend(given) or ids)
    assert Answerer(world.generator, [example], shots=1).generate([question]) == ["a"] and read == [shown]


def test_examples_are_drawn_by_seed_and_question_and_never_show_its_image(world):
    lines = [{"image": f"{n}.png", "question": "what?", "answer": f"{n}", "question_id": n} for n in (1, 2, 3, 4)]
    examples = write(world, "examples.jsonl", lines)
    candidates = world.path / "candidates.txt"
    candidates.write_text("1\n2\n\n3\n2\n")
    command = ["--format", "jsonl", "--questions", examples, "--examples", examples, "--shots", 3,
               "--method", "rank", "--candidates", candidates]  # fmt: skip
    result, submission = run(world, "shots", *command)
    right = [one["answer"] == str(one["question_id"]) for one in submission]
    assert result.figures["accuracy"].value == 25 * sum(right) and result.settings["shots"] == 3
    assert result.settings["accuracy"] == "1 if the answer equals one of the expected answers"
    alone, _ = run(world, "alone", *command, "--count", 2)
    assert alone.tables["examples"] == result.tables["examples"][:2]
    assert "shots (4) must be at most the number of examples" in refuse(world, *command[:-4], "--shots", 4)
    assert "question 1 with 3 examples and an answer of 301 tokens needs" in refuse(
        world, *command[:-4], "--longest", 300
    )


def test_visdial(world):
    answers = ["yes", "no", "it is gray", "2"]
    rounds = [
        {"question": 0, "answer": 1, "answer_options": [0, 1, 2, 3], "gt_index": 1},
        {"question": 1, "answer": 2, "answer_options": [3, 2, 1, 0], "gt_index": 1},
    ]
    dialogs = [{"image_id": n, "caption": "a gray image.", "dialog": rounds} for n in (1, 2)]
    data = {"questions": ["is it red", "what is it?"], "answers": answers, "dialogs": dialogs}
    questions = write(world, "visdial.json", {"split": "val2018", "data": data})
    dense = [{"image_id": n, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.5, 0.0]} for n in (1, 2)]
    command = ["--format", "visdial", "--questions", questions]
    result, submission = run(world, "visdial", *command, "--annotations", write(world, "dense.json", dense))
    history = "a gray image. Question: is it red? Answer: no."
    image = world.path / "1.png"
    second = Question(key="x", text="what is it?", context=history, image=image, candidates=tuple(answers[::-1]))
    [scores] = Answerer(world.generator).score([second])
    assert [one["round_id"] for one in submission] == [1, 2, 1, 2]
    assert submission[1]["ranks"] == [1 + int((scores > score).sum()) for score in scores]
    ranks = [one["ranks"][1] for one in submission]
    assert result.figures["mean_rank"].value == pytest.approx(np.mean(ranks)) and result.figures["r@5"].value == 1
    assert result.figures["mrr"].value == pytest.approx(np.mean(1 / np.array(ranks))) and result.figures["mrr"].n == 2
    assert 0 <= result.figures["ndcg"].value <= 1 and "accuracy" not in result.figures
    others = write(world, "others.json", [dense[0] | {"image_id": 9}])
    assert "do not match: 1 of 1 annotated rounds are not in the dialogs" in refuse(
        world, *command, "--annotations", others
    )
    assert "method (generate) must be rank for the format visdial" in refuse(world, *command, "--method", "generate")


def test_an_interrupted_evaluation_continues(world, monkeypatch):
    monkeypatch.setattr(vqa, "AT_ONCE", 1)
    questions, annotations = write_vqa(world)
    options = {"model": world.path / "model", "format": "vqa", "questions": str(questions), "longest": 2}
    options |= {"annotations": str(annotations), "output": world.path / "interrupted"}
    calls, generate = [], Answerer.generate

    def interrupt(self, part):
        calls.append([one.key for one in part])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, part)

    monkeypatch.setattr(Answerer, "generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vqa.evaluate(**options)
    continued = vqa.evaluate(**options)
    assert calls == [["10"], ["20"], ["20"], ["30"]]
    assert continued == vqa.evaluate(**options | {"output": world.path / "at once"})
    first, other = run_ranks(2, lambda ranks: vqa.evaluate(**options | {"output": world.path / "two", "ranks": ranks}))
    assert first == continued and other is None


def test_an_image_that_cannot_be_decoded_costs_no_finished_answers(world, monkeypatch):
    monkeypatch.setattr(vqa, "AT_ONCE", 1)
    questions, annotations = write_vqa(world)
    options = {"model": world.path / "model", "format": "vqa", "questions": str(questions), "longest": 2}
    options |= {"annotations": str(annotations), "output": world.path / "undecodable"}
    damaged = world.path / "COCO_val2014_000000000002.jpg"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100])
    try:
        with pytest.raises(ValueError, match=r"0002.jpg: .*; replace the file, and repeat the command, which cont"):
            vqa.evaluate(**options)
    finally:
        damaged.write_bytes(content)
    finished = (world.path / "undecodable/items.jsonl").read_text()
    assert '"key": "10"' in finished and '"key": "20"' not in finished
    vqa.evaluate(**options)
    assert (world.path / "undecodable/items.jsonl").read_text().startswith(finished)


def test_files_that_do_not_match_are_refused(world):
    questions, annotations = write_vqa(world)
    command = ["--format", "vqa", "--questions", questions, "--annotations"]
    content = json.loads(annotations.read_text())

    def change(name, *changed):
        return write(world, name, content | {"annotations": list(changed)})

    one, two, three = content["annotations"]
    assert "1 of 3 questions have no annotation, the first is question_id 20" in refuse(
        world, *command, change("a.json", one, three)
    )
    beyond = change("b.json", one, two, three, three | {"question_id": 99})
    assert "1 of 4 annotations have no question, the first is question_id 99" in refuse(world, *command, beyond)
    other = change("c.json", one, two, three | {"image_id": 1})
    assert "1 of 3 questions have another image in their annotation" in refuse(world, *command, other)
    few = change("d.json", one, two, three | {"answers": one["answers"][:3]})
    assert "question 30 has 3 human answers; VQA's accuracy needs at least 4" in refuse(world, *command, few)
    assert "is not a file of format vqa, or lacks a field" in refuse(world, *command, write(world, "e.json", [1]))
    assert "nothing.json" in refuse(world, *command, world.path / "nothing.json")


def test_bad_input_is_one_sentence(world):
    questions, _ = write_vqa(world)
    command = ["--format", "vqa", "--questions", questions]
    assert "3 of 3 questions of" in refuse(world, *command, "--images", world.path / "test")
    assert "image_name ('{x}.jpg') must be a name with {image_id}" in refuse(world, *command, "--image-name", "{x}.jpg")
    assert "shots (9) must be 0 to 8" in refuse(world, *command, "--shots", 9)
    assert "shots (1) requires a file to take examples from" in refuse(world, *command, "--shots", 1)
    assert "question 10 has no candidates; give --candidates" in refuse(world, *command, "--method", "rank")
    assert "count (0) must be at least 1" in refuse(world, *command, "--count", 0)
    lines = [{"image": "1.png", "question": "what?", "question_id": 1}] * 2
    command = ["--format", "jsonl", "--questions"]
    assert "has two questions 1; remove one" in refuse(world, *command, write(world, "twice.jsonl", lines))
    assert "question 0 is empty" in refuse(world, *command, write(world, "empty.jsonl", [{"question": " "}]))
    assert "has no questions" in refuse(world, *command, write(world, "none.jsonl", []))
    wrong = write(world, "wrong.jsonl", [{"question": "a", "candidates": ["b"], "correct": 1}])
    assert "its answer (1) must be a number of its 1 candidates" in refuse(world, *command, wrong)
    (world.path / "damaged.jsonl").write_text('{"question": "a"}\n{"quest')
    assert "damaged.jsonl:2: not valid JSON" in refuse(world, *command, world.path / "damaged.jsonl")
