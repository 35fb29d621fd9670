"""Items of a task that several ranks share: the same as with one rank, after interruptions too; errors of one rank."""

import json
import platform
import subprocess
import sys
from contextlib import closing

import pytest

from megatron_cm3leon.distributed.launch import Rank
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import FinishedItems
from megatron_cm3leon.evaluation.tasks import caption, loss
from tests.checkpoint.builders import write_tokenizers
from tests.data.corpora import make_pairs, write_shards
from tests.distributed.launch import ROOT, child_environment, torchrun
from tests.evaluation.rank_threads import run_ranks
from tests.models import save_random_opt
from tests.tools.call import call_tool

THINGS = {f"key {number}": number for number in range(11)}
BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


def finish(ranks, folder, fail_after=None):
    """Finish the items of THINGS; the batches that this rank computed, and the items that it has then."""
    batches = []

    def compute(numbers):
        if len(batches) == fail_after:
            raise KeyboardInterrupt
        batches.append(numbers)
        return [{"square": number**2} for number in numbers]

    finished = ranks.open_items(folder, {"seed": 1})
    try:
        label = f"squares by rank {ranks.rank.rank}"
        ranks.finish_items(THINGS, compute, finished, batch_size=3, label=label, unit="numbers")
    except KeyboardInterrupt:
        pass
    finally:
        finished.close()
    return batches, finished.items


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_ranks_computes_the_same_batches_once(tmp_path, count, capsys):
    found = run_ranks(count, lambda ranks: finish(ranks, tmp_path))
    assert [batches for batches, _ in found] == [BATCHES[rank::count] for rank in range(count)]
    assert found[0][1] == {key: {"square": number**2} for key, number in THINGS.items()}
    names = ["items.jsonl", *(f"items-{rank}.jsonl" for rank in range(1, count))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    lines = [line for name in names for line in (tmp_path / name).read_text().splitlines()]
    assert lines.count('{"identity": {"seed": 1}}') == count and len(lines) == count + len(THINGS)
    shown = capsys.readouterr().out  # one rank shows the progress of all
    assert "squares by rank 0: 11/11 numbers" in shown and "rank 1" not in shown


def test_an_interrupted_launch_continues_with_another_number_of_ranks(tmp_path):
    interrupted = run_ranks(3, lambda ranks: finish(ranks, tmp_path, fail_after=0 if ranks.rank.rank == 1 else 1))
    assert [batches for batches, _ in interrupted] == [[BATCHES[0]], [], [BATCHES[2]]]
    last = tmp_path / "items-2.jsonl"
    last.write_text(last.read_text()[:-8])  # killed while it wrote the last item of its batch
    continued = run_ranks(2, lambda ranks: finish(ranks, tmp_path))
    assert [batches for batches, _ in continued] == [[BATCHES[1], BATCHES[3]], [BATCHES[2]]]
    assert continued[0][1] == {key: {"square": number**2} for key, number in THINGS.items()}
    assert run_ranks(1, lambda ranks: finish(ranks, tmp_path)) == [([], continued[0][1])]


def test_items_of_any_rank_with_another_identity_are_refused(tmp_path):
    FinishedItems(tmp_path, {"seed": 2}, rank=3).close()
    with pytest.raises(ValueError, match=r"items-3\.jsonl is of a run with another seed; give another --output"):
        Ranks().open_items(tmp_path, {"seed": 1})
    assert not (tmp_path / "items.jsonl").exists()


def test_ranks_that_see_different_folders_are_told_apart(tmp_path):
    def work(ranks):
        try:
            finish(ranks, tmp_path / str(ranks.rank.rank))
        except ValueError as error:
            return str(error)

    message, other = run_ranks(2, work)
    assert other is None and message.startswith(f"5 of 11 items are not in {tmp_path / '0'}: other ranks wrote them")


def test_what_ranks_do_not_share_is_refused(tmp_path):
    Ranks().require_one("the task fid")
    several = Ranks(Rank(rank=1, world_size=2, local_rank=1, local_world_size=2))
    with pytest.raises(ValueError, match=r"the task fid is not shared among ranks, but 2 were started \(WORLD_SIZE\)"):
        several.require_one("the task fid")
    with (
        closing(Ranks().open_items(tmp_path, {})) as finished,
        pytest.raises(ValueError, match=r"--batch-size \(0\) must be at least 1"),
    ):
        Ranks().finish_items(THINGS, list, finished, batch_size=0, label="squares", unit="numbers")


def test_an_error_of_one_rank_ends_all_with_one_message(tmp_path):
    command = [sys.executable, str(ROOT / "tests/evaluation/failing_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    statuses = json.loads((tmp_path / "statuses.json").read_text())
    printed = {name: (tmp_path / f"{name}.txt").read_text() for name in statuses}
    host = platform.node()
    assert statuses["fail_on_one_rank"] == [2, 2]
    assert printed["fail_on_one_rank"] == f"error (rank 1 on {host}): image 1 is damaged.\n"
    assert statuses["fail_on_all_ranks"] == [2, 2]
    assert printed["fail_on_all_ranks"].count("there are no images.") == printed["fail_on_all_ranks"].count("\n") == 1
    assert (statuses["misspell_an_option"], printed["misspell_an_option"]) == ([2, 2], "usage: evaluate.py\n")
    assert statuses["kill_one_rank"] == [1, -9]
    assert "error: rank 1 on host" in printed["kill_one_rank"] and printed["kill_one_rank"].count("\n") == 1


def test_two_ranks_of_torchrun_give_the_result_of_one_process(tmp_path):
    model, shards = tmp_path / "model", tmp_path / "shards"
    vocabulary = write_tokenizers(model)
    save_random_opt(model, vocabulary, positions=64)
    (model / "cm3leon.json").write_text('{"training": {}}')
    write_shards(shards, make_pairs(10, vocabulary), vocabulary)
    options = ["caption", "--model", model, "--shards", shards, "--temperature", 1, "--longest", 12, "--batch-size", 3,
               "--metrics", "bleu", "cider", "rouge", "--device", "cpu", "--output"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    done = call_tool("evaluate", *options, one)
    assert done.returncode == 0, done.stderr
    launched = torchrun(2, "tools/evaluate.py", *map(str, options), str(two))
    assert "captioning: 10/10 images" in launched.stdout and launched.stdout.count(f"wrote {two}") == 1
    for name in ("caption.json", "captions.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert len({entry["caption"] for entry in json.loads((one / "captions.json").read_text())}) > 5
    first, second = [(two / name).read_text().splitlines() for name in ("items.jsonl", "items-1.jsonl")]
    assert (len(first), len(second)) == (1 + 6, 1 + 4)
    assert sorted([*first, *second[1:]]) == sorted((one / "items.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("task", "options"),
    [(caption, {"metrics": ["rouge"], "longest": 4, "batch_size": 2}), (loss, {"documents": [0]})],
    ids=["caption", "loss"],
)
def test_ranks_compute_the_result_of_one_rank(inputs, monkeypatch, task, options):
    monkeypatch.setattr(loss, "AT_ONCE", 3)
    options |= {"model": inputs.model, "shards": inputs.shards}
    alone = task.evaluate(output=inputs.path / "alone", **options)
    first, *others = run_ranks(3, lambda ranks: task.evaluate(output=inputs.path / "out", ranks=ranks, **options))
    assert first == alone and others == [None, None]
