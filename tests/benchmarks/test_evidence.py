"""The evidence: order and resuming of its units, the rule of its claims, and everything once at tiny size."""

import json
import runpy
import sys

import claims.prepare
import evidence
import numpy as np
import pytest
import retrieval_gain
from claims.infill import GREEDY, choose_word, measure_infilling
from claims.plan import DEFAULT_SIZES, FAMILIES, STUDIES, Plan, Unit
from claims.prepare import write_lists
from claims.references import find_nearest_captions
from claims.results import Results, lock_unit, pack_values, unpack_values
from claims.statements import ARMS, Claim, list_claims
from claims.verdicts import decide, judge_claim

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.generator import Generator
from tests.benchmarks.pairs import write_pairs
from tests.data.corpora import make_vocabulary
from tests.models import make_tokenizers, save_random_opt

SHARED = {"settings": {"items": 1200}, "versions": {}, "hashes": {"clip": "a"}}
PLAN = Plan(["retrieval"], ["0.6M"], ["llama"], [0, 1])


def full_plan() -> Plan:
    return Plan(list(STUDIES), list(DEFAULT_SIZES), list(FAMILIES), [0, 1, 2])


def test_seed_0_of_everything_comes_first_and_models_before_their_arms():
    units = full_plan().list_units()
    assert [unit.seed for unit in units] == sorted(unit.seed for unit in units)
    for place, unit in enumerate(units):
        assert set(unit.requires) <= set(units[:place]), unit
    trainings = [unit for unit in units if unit.study == "train"]
    # Three kinds at the middle size and two more sizes, of two families and three seeds.
    assert len(trainings) == len(set(trainings)) == (3 + 2) * 2 * 3
    assert len({unit.name for unit in units}) == len(units)


def test_every_arm_of_a_claim_is_measured():
    units = {(unit.study, unit.arm, unit.size) for unit in full_plan().list_units()}
    for claim in list_claims(len(DEFAULT_SIZES)):
        sizes = [DEFAULT_SIZES[place] for place in claim.sizes or (1, 1)]
        for arm, size in zip((claim.better, claim.worse), sizes, strict=True):
            assert (*arm, size) in units or (*arm, "none") in units, claim


def test_one_study_brings_the_arms_that_it_is_compared_with():
    units = Plan(["memory"], ["0.6M"], ["llama"], [0]).list_units()
    assert Unit("retrieval", "random-2", "llama", "0.6M", 0, "retrieval") in units
    assert not any(unit.arm == "trained-without" for unit in units)


def test_values_survive_packing():
    random = np.random.default_rng(0)
    bits, numbers = random.random(1003) < 0.3, random.random(1003) * 7
    assert (unpack_values(json.loads(json.dumps(pack_values(bits)))) == bits).all()
    found = unpack_values(json.loads(json.dumps(pack_values(numbers))))
    assert np.abs(found - numbers).max() < 1e-4
    assert len(json.dumps(pack_values(numbers))) < 3000


def test_results_continue_after_a_kill_and_refuse_other_settings(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = (Unit("retrieval", "documents-0", "llama", "0.6M", seed, "retrieval") for seed in (0, 1))
    results = Results(path, SHARED)
    for unit in (first, second):
        results.add(unit, 1.0, {"figures": {}})
    text = path.read_text()
    path.write_text(text[:-20])  # killed while the last line was written
    continued = Results(path, SHARED)
    assert list(continued.lines) == [first.key]
    continued.add(second, 1.0, {"figures": {}})
    assert [key for key in Results(path).lines] == [first.key, second.key]
    with pytest.raises(ValueError, match=r"has results of another items \(1200, now 9\); give another --results"):
        Results(path, SHARED | {"settings": {"items": 9}})
    with pytest.raises(ValueError, match=r"has results of another clip \(a, now b\)"):
        Results(path, SHARED | {"hashes": {"clip": "b"}})


def test_processes_share_the_units(tmp_path):
    unit = Unit("retrieval", "documents-0", "llama", "0.6M", 0, "retrieval")
    here, there = (Results(tmp_path / "results.jsonl", SHARED) for _ in range(2))
    with lock_unit(tmp_path / "locks", unit) as ours, lock_unit(tmp_path / "locks", unit) as theirs:
        assert ours and not theirs
        here.add(unit, 1.0, {})
    there.add(unit.training, 1.0, {})
    here.read()
    assert list(here.lines) == [unit.key, unit.training.key]
    with lock_unit(tmp_path / "locks", unit) as theirs:
        assert theirs


def test_time_left_follows_measured_times(tmp_path):
    units = [Unit("retrieval", "documents-0", family, "0.6M", seed) for family in FAMILIES for seed in (0, 1)]
    results = Results(tmp_path / "results.jsonl", SHARED)
    guessed = evidence.estimate_seconds(units, results)
    results.add(units[0], 7.0, {})
    assert evidence.estimate_seconds(units[1:], results) == 21.0
    # Other units are guessed on the scale of what was measured.
    other = [Unit("retrieval", "documents-1", "llama", "0.6M")] * 4
    assert evidence.estimate_seconds(other, results) == pytest.approx(7.0 / (guessed / 4) * guessed)


@pytest.mark.parametrize(
    ("advantages", "interval", "items", "result"),
    [
        ([1.0, 2.0], (0.5, 2.0), 1000, "holds"),
        ([1.0, -0.1], (0.5, 2.0), 1000, "fails"),  # another sign in one seed
        ([1.0, 2.0], (-0.1, 2.0), 1000, "fails"),  # the interval includes 0
        ([-1.0, -2.0], (-2.0, -0.5), 1000, "fails: the opposite holds"),
        ([1.0], (0.5, 2.0), 1000, "not yet measured (1 of 2 seeds)"),
        ([1.0, 2.0], (0.5, 2.0), 999, "not yet measured (999 of 1000 items)"),
    ],
)
def test_the_rule_of_a_claim(advantages, interval, items, result):
    assert decide(np.array(advantages), interval, items, 2) == result


def add_arm(results: Results, arm: str, seed: int, right: np.ndarray, distance: float) -> None:
    figures = {"right": [100 * right.mean()], "fd": [distance]}
    noise = np.random.default_rng(9).normal(0, 0.01, 50)  # the same sets of items in every arm
    content = {"figures": figures, "values": {"right": pack_values(right)}, "fd_resamples": (distance + noise).tolist()}
    results.add(Unit(*ARMS[arm], "llama", "0.6M", seed), 1.0, content)


def test_claims_are_paired_by_item_and_by_resampled_set(tmp_path):
    results = Results(tmp_path / "results.jsonl", SHARED)
    random = np.random.default_rng(0)
    for seed in (0, 1):
        base = random.random(1200) < 0.5
        better = base | (random.random(1200) < 0.02)  # never wrong where the other is right
        add_arm(results, "0 documents", seed, base, 0.2)
        add_arm(results, "2 documents", seed, better, 0.199)
    accuracy, distance = (Claim("", each, ARMS["2 documents"], ARMS["0 documents"]) for each in ("right", "fd"))
    verdict = judge_claim(accuracy, "llama", results, PLAN)
    assert verdict.result == "holds" and verdict.items == 1200
    assert verdict.interval[0] < np.mean(verdict.differences) < verdict.interval[1] < 2.5
    # Smaller distances are better, and common noise cancels.
    verdict = judge_claim(distance, "llama", results, PLAN)
    assert verdict.result == "holds" and verdict.interval == pytest.approx((-1, -1))
    reverse = Claim("", "right", ARMS["0 documents"], ARMS["2 documents"])
    assert judge_claim(reverse, "llama", results, PLAN).result == "fails: the opposite holds"
    assert judge_claim(accuracy, "cm3leon", results, PLAN).result == "not yet measured"


def test_lists_hold_out_names_and_styles(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    write_lists(pairs, tmp_path / "lists")
    lists = {
        name: [json.loads(line) for line in (tmp_path / f"lists/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout", "memory", "pairs", "all")
    }
    trained = {line["name"] for line in lists["train"]}
    assert {line["source"] for line in lists["train"]} == {"flat", "line", "dots"}
    for line in lists["heldout"]:
        assert (line["name"] in trained) == (line["heldout"] == "style")
        assert (line["source"] == "openmoji") == (line["heldout"] == "style")
    assert len(lists["memory"]) == len(lists["train"]) + sum(line["heldout"] == "name" for line in lists["heldout"])
    assert len(lists["all"]) == 2 * 112 and len(lists["pairs"]) == 2 * len(lists["train"])
    assert [line["caption"] for line in lists["pairs"][:2]] == [lists["train"][0]["caption"], lists["train"][0]["name"]]


def test_pairs_without_names_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"image": "a.png", "caption": "a"}\n')
    with pytest.raises(ValueError, match="has no lines with image, caption, name, style, source and heldout"):
        write_lists(tmp_path, tmp_path / "lists")
    with pytest.raises(ValueError, match=r"train.jsonl does not exist; give the output folder of examples/icons"):
        write_lists(tmp_path / "none", tmp_path / "lists")


def test_nearest_caption_weights_rare_words():
    others = ["dog, flat style", "red fox, line style", "fox, flat style", "flat style: cat"]
    assert find_nearest_captions(["fox, line style", "cat, flat style", "unknown"], others) == [1, 3, 0]


def test_a_word_is_chosen_with_context_before_it():
    assert choose_word("red circle", 3) == ("red", "circle", "")
    before, word, after = choose_word("one two three four five", 8)
    assert before and " ".join(filter(None, (before, word, after))) == "one two three four five"


def test_wrong_stage_and_missing_preparation(tmp_path):
    with pytest.raises(ValueError, match=r"'tran' is not a stage; the stages are prepare, train, measure, page"):
        evidence.main(["tran"])
    options = ["measure", "--work", str(tmp_path), "--results", str(tmp_path / "results.jsonl")]
    with pytest.raises(ValueError, match=r"has no lists/heldout.jsonl; run the stage prepare first"):
        evidence.main(options)


WORDS = ["x", "red", "blue", "circle", "square", "flat", "style"]
VOCABULARY = make_vocabulary(text=len(WORDS), image=8, height=4, width=4, sentinels=2, specials=6)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_random_opt(folder, VOCABULARY, hidden_size=16, positions=64)
    return Generator(Decoder.load(folder), make_tokenizers(WORDS, VOCABULARY), {"image_first_probability": 0.3})


class Pairs:
    """Items of captions and codes."""

    def __init__(self, captions, codes):
        self.captions, self.codes, self.numbers = captions, codes, [1] * len(captions)

    def read_codes(self, vocabulary, part):
        return self.codes[part]

    def read(self, part):
        break_id, start = VOCABULARY.break_id, VOCABULARY.image_start
        rows = zip(self.captions[part], self.codes[part], strict=True)
        return [np.array([*map(WORDS.index, text.split()), break_id, *(start + row)]) for text, row in rows]


@pytest.mark.parametrize("masked", [True, False])
def test_only_masked_models_read_what_follows_the_box_and_the_word(generator, masked):
    codes = np.random.default_rng(0).integers(0, 8, (2, 16))
    caption = "red circle flat style"
    assert choose_word(caption, 1) == ("red", "circle", "flat style")
    other = "red circle blue blue"
    first = measure_infilling(generator, Pairs([caption] * 2, codes), slice(0, 2), masked)
    changed = codes.copy()
    changed[:, 12:] = 7 - changed[:, 12:]  # the last row, below the box
    below = measure_infilling(generator, Pairs([caption] * 2, changed), slice(0, 2), masked)
    assert (np.abs(below["box_nats"] - first["box_nats"]) > 1e-4).all() == masked
    after = measure_infilling(generator, Pairs([other] * 2, codes), slice(0, 2), masked)
    assert (np.abs(after["text_nats"] - first["text_nats"]) > 1e-4).all() == masked
    assert first["losses"].shape == (2, 3) and first["text_right"].dtype == bool
    assert set(np.round(first["box_right"] * 4, 6)) <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("masked", "form"), [(True, "masked"), (False, "raster")])
def test_generated_codes_are_compared_with_the_true_ones(generator, masked, form):
    """The codes that the model itself generates are right, in both forms."""
    codes = np.random.default_rng(1).integers(0, 8, (1, 16))
    box = (1, 1, 3, 3)
    made = generator.infill_images(list(codes), box, GREEDY, captions=["red circle"], form=form)
    found = measure_infilling(generator, Pairs(["red circle"], made[0].codes[None]), slice(0, 1), masked)
    assert found["box_right"][0] == 1.0


@pytest.fixture
def tools_in_this_process(monkeypatch):
    """Run the tools one after the other in this process, which imports the libraries once; trainings have their own."""
    start = retrieval_gain.run

    def run(script, *arguments):
        if script == "-m":
            return start(script, *arguments)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(retrieval_gain.ROOT / script), run_name="__main__")
        assert not end.value.code

    monkeypatch.setattr(retrieval_gain, "run", run)
    monkeypatch.setattr(claims.prepare, "run_together", lambda *stages: [stage() for stage in stages])


@pytest.mark.slow
@pytest.mark.usefixtures("tools_in_this_process")
def test_everything_at_tiny_size(tmp_path):
    pairs, page = write_pairs(tmp_path / "pairs"), tmp_path / "docs/evidence.md"
    page.parent.mkdir()
    marks = [f"<!-- tables of benchmarks/evidence.py: {word} -->" for word in ("begin", "end")]
    page.write_text("\n".join(["# Evidence", *marks, "what was tried", ""]))
    results = tmp_path / "results.jsonl"
    options = ["--pairs", pairs, "--work", tmp_path / "work", "--results", results, "--page", page, "--small"]
    options += ["--items", 12, "--names", 7, "--tokens", 1.2e4, "--sizes", "0.6M", "--families", "llama", "--seeds", 0]
    options = [*map(str, options), "--study", "memory", "decoding"]
    evidence.main(["prepare", "train", "measure", "page", *options])
    written = results.read_text()
    lines = [json.loads(line) for line in written.splitlines()][1:]
    assert [line["arm"] for line in lines if line["study"] == "train"] == ["retrieval"]
    arms = {line["arm"]: line for line in lines}
    assert {"true-style", "clip-bank", "bank-2", "given-2", "demonstrations-4", "best-together"} <= set(arms)
    for line in lines:
        if line["study"] != "train":
            right = unpack_values(line["values"]["right"])
            assert len(right) == 12 and line["figures"]["right"][0] == pytest.approx(100 * right.mean(), abs=0.01)
            assert len(line["fd_resamples"]) == 200 and line["figures"]["fd"][0] >= 0
    assert arms["demonstrations-4"]["settings"]["documents"] == 4
    assert arms["documents-0"]["figures"]["loss"] != arms["bank-2"]["figures"]["loss"]
    assert arms["best-together"]["curve"].keys() == {"2", "4", "8"}
    text = page.read_text()
    assert text.endswith("what was tried\n") and "not yet measured (12 of 1000 items)" in text
    assert (tmp_path / "docs/images/evidence_decoding.png").stat().st_size > 5000

    # Killed while it wrote the line of an arm, of which one part was finished: it continues, with the same figures.
    results.write_text("".join(line + "\n" for line in written.splitlines()[:-3]) + '{"study": "dec')
    evidence.main(["measure", *options])
    again = [json.loads(line) for line in results.read_text().splitlines()][1:]
    for before, after in zip(lines, again, strict=True):
        assert {**before, "seconds": 0, "finished": ""} == {**after, "seconds": 0, "finished": ""}
