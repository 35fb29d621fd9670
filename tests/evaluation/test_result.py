"""Results of evaluation tasks: intervals, files, and tasks that continue after an interruption."""

import json

import numpy as np
import pytest

from megatron_cm3leon.evaluation.result import Figure, FinishedItems, Result, bootstrap, hash_input, read_result


def test_a_bootstrap_interval_covers_the_true_mean_in_about_95_percent_of_samples():
    random = np.random.default_rng(0)
    figures = [bootstrap(random.normal(3, 1, 50), seed=number, resamples=200) for number in range(100)]
    covered = np.mean([figure.low <= 3 <= figure.high for figure in figures])
    assert 0.9 <= covered <= 0.98
    assert figures[0].n == 50 and bootstrap([1.0, 2.0], seed=1) == bootstrap([1.0, 2.0], seed=1)


@pytest.mark.parametrize(("items", "message"), [([], "no items"), ([1.0, np.nan], "1 of 2 values are not finite")])
def test_a_figure_of_no_or_damaged_items_is_refused(items, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(items)


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = Result(
        task="loss",
        figures={"loss": Figure(1.5, 1.25, 1.75, 10, "nats per token")},
        settings={"documents": 1},
        inputs={"model": "ab"},
        notes=["a note"],
    )
    path = result.write(tmp_path / "new")
    found = read_result(path)
    assert path == tmp_path / "new" / "loss.json" and found.figures == result.figures and found.notes == result.notes
    assert {"python", "torch", "numpy"} <= set(found.versions)
    assert str(found.figures["loss"]) == "1.5 [1.25, 1.75] nats per token, n = 10"


FIGURE = '"figures": {"loss": {"value": 1}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "is not a result of .*, or is damaged: not valid JSON .*; repeat the command that wrote it",
        ),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"format": 1, "task": "lo', "not valid JSON"),
        (b"[]", "is not a result of tools/evaluate.py: it has no format; give a TASK.json"),
        (b"{}", "it has no format"),
        (b'{"format": "1"}', "it has no format"),
        (b'{"format": 99}', "has format 99; this version reads up to 1: read it with a later version"),
        (b'{"format": 1, "task": "loss"}', "figures is missing; repeat the command that wrote it"),
        (b'{"format": 1, "task": 3}', "task is 3; repeat"),
        (b'{"format": 1, "task": "loss", "figures": [1]}', r"figures is \[1\]; repeat"),
        (f'{{"format": 1, "task": "loss", {FIGURE}}}'.encode(), "settings is missing"),
        (b'{"format": 1, "task": "a", "settings": {}, "figures": {"b": {"value": null}}}', "the figure b is {.*null}"),
        (b'{"format": 1, "task": "a", "settings": {}, "figures": {"b": 2}}', "the figure b is 2; repeat"),
        (b'{"format": 1, "task": "a", "settings": {}, "figures": {"b": {"value": 1, "n": "3"}}}', "the figure b is"),
    ],
)
def test_another_or_an_incomplete_file_is_not_taken_for_a_result(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.json .*{message}"):
        read_result(tmp_path / "x.json")


def test_keys_of_a_later_version_are_not_read(tmp_path):
    figure = '"figures": {"loss": {"value": 1, "more": 2}}'
    (tmp_path / "x.json").write_text(f'{{"format": 1, "task": "loss", {figure}, "settings": {{}}, "more": 1}}')
    assert read_result(tmp_path / "x.json") == Result(task="loss", figures={"loss": Figure(1)}, settings={})


def test_the_hash_of_a_folder_depends_on_names_and_contents(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("x")
    assert hash_input(tmp_path / "one") == hash_input(tmp_path / "two")
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "b")
    assert hash_input(tmp_path / "one") != hash_input(tmp_path / "two")
    with pytest.raises(ValueError, match=r"no file or folder at .*three"):
        hash_input(tmp_path / "three")


def test_finished_items_survive_an_interruption_and_another_identity_is_refused(tmp_path):
    items = FinishedItems(tmp_path, {"seed": 1, "sizes": (2, 3)})
    items.add("a", {"loss": 1.5})
    items.close()
    with open(tmp_path / "items.jsonl", "a") as file:
        file.write('{"key": "b", "it')  # killed while writing
    continued = FinishedItems(tmp_path, {"seed": 1, "sizes": (2, 3)})
    assert continued.items == {"a": {"loss": 1.5}}
    continued.add("b", {"loss": 2.5})
    continued.close()
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "items.jsonl").read_text().splitlines()[2]) == {"key": "b", "item": {"loss": 2.5}}
    with pytest.raises(ValueError, match="of a run with different seed; give another --output"):
        FinishedItems(tmp_path, {"seed": 2, "sizes": (2, 3)})
