"""The table of a mixture, and the stream that has its shares."""

import numpy as np
import pytest

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.inspect.mixture import describe_mixture
from megatron_cm3leon.data.stream.stream import build_stream
from megatron_cm3leon.train import dry_run, report_data
from tests.data.corpora import make_vocabulary, write_instructions, write_shards

V = make_vocabulary()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_instructions(folder / "tasks", 90, V)
    write_shards(folder / "texts", [[1, 2, 3]] * 9, V)
    write_shards(folder / "few", [[1, 2]], V)
    return folder


def make_config(folder, sources, *overrides):
    path = folder / "config.yaml"
    path.write_text(f"data: {{seq_length: 64, sources: [{', '.join(f'{{{each}}}' for each in sources)}]}}\n")
    config = load_config(path, ["model.layers=1", f"output={folder}", *overrides])
    validate_config(config)
    return config


def test_the_table_has_shares_and_ratios_before_and_after_the_limits(folder):
    sources = [f"shards: {folder / name}" for name in ("tasks", "texts", "few")]
    config = make_config(folder, sources, "data.mixture.rule=documents", "data.mixture.alpha=0")
    header, *rows, total, note = describe_mixture(config).splitlines()
    assert header.split() == ["source", "documents", "share", "ratio", "limited", "samples", "per", "epoch"]
    # Equal shares of 100 documents are .370, 3.70 and 33.3 samples per document; 33, 27 and 3 samples remain.
    assert [row.split()[1:] for row in rows] == [
        ["90", "52.38%", "0.37", "0.37", "33"],
        ["9", "42.86%", "3.70", "3.00", "27"],
        ["1", "4.76%", "33.33", "3.00", "3"],
    ]
    assert rows[0].split()[0] == str(folder / "tasks") and total.split() == ["total", "100", "100%", "63"]
    assert note == "the sources alternate in cycles of 21 samples"
    assert describe_mixture(config) in dry_run(config, 1)
    stream = build_stream(config)
    assert stream.samples.mixture.weights == [11, 9, 1]
    owners, _ = stream.samples.mixture.split(np.arange(63))
    assert np.bincount(owners).tolist() == [33, 27, 3]


def test_training_prints_the_table_and_names_documents_that_do_not_fit(folder, capsys, caplog):
    write_shards(folder / "long", [[1, *[2] * 30]], V, targets=[[(1, 31)]])
    config = make_config(folder, [f"shards: {folder / 'tasks'}", f"shards: {folder / 'long'}"], "data.seq_length=20")
    report_data(config, build_stream(config))
    assert capsys.readouterr().out.strip() == describe_mixture(config)
    assert "long have targets longer than a sequence of 21 tokens, such as document 0 (made) with 30" in caplog.text


def test_given_weights_and_shares_are_in_the_table(folder):
    given = make_config(folder, [f"shards: {folder / 'tasks'}, weight: 3", f"shards: {folder / 'texts'}"])
    rows = describe_mixture(given).splitlines()[1:]
    assert [row.split()[1:] for row in rows] == [
        ["90", "75.00%", "0.82", "0.82", "74"], ["9", "25.00%", "2.75", "2.75", "25"], ["99", "100%", "99"]
    ]  # fmt: skip
    assert build_stream(given).samples.mixture.weights == [3, 1]
    shares = [f"shards: {folder / 'tasks'}", f"shards: {folder / 'texts'}, share: 0.25"]
    config = make_config(folder, shares, "data.mixture.rule=documents")
    assert describe_mixture(config).splitlines()[2].split()[1:] == ["9", "25.00%", "2.75", "2.75", "25"]
    assert describe_mixture(load_config(None, ["data.shards=none"])) == ""
