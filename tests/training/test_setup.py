"""What may change when a run is resumed: new fields at their default change nothing, every other change is named."""

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config import loading
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.schema import CM3Config, DataConfig, RetrievalConfig
from megatron_cm3leon.config.setting import Setting
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.stream.identity import describe_sources, identify
from megatron_cm3leon.data.stream.samples import DataSource
from megatron_cm3leon.data.stream.stream import Stream
from megatron_cm3leon.training.setup import check_changes
from tests.checkpoint.builders import write_random_checkpoint
from tests.data.corpora import make_neighbors, make_pairs, make_vocabulary, write_shards

VOCABULARY = make_vocabulary()
SMALL = ["model.layers=1", "model.hidden_size=8", "model.heads=2", "data.seq_length=40", "retrieval.documents=2"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return [write_shards(folder / str(seed), make_pairs(20, VOCABULARY, seed), VOCABULARY) for seed in (0, 1)]


def make_config(*overrides):
    config = load_config(None, [*SMALL, *overrides])
    validate_config(config)
    return config


def make_stream(config, corpus, neighbors=True, weights=None):
    """A stream of one corpus, or of several sources with `weights`, all of that corpus."""
    found = make_neighbors(corpus) if neighbors else None
    return Stream(config, [DataSource(corpus, found, weight) for weight in weights or [1.0]])


def make_state(stream, version=2):
    """The state of a run at step 5 that trained on `stream`."""
    sources = describe_sources(stream.samples, stream.config)
    identity = identify(sources, stream.config, version)
    return TrainState(step=5, batch=5, stream=identity, stream_parts=sources if version == 2 else {})


def resume(stream, state, old, *allowed):
    """Resume with stream.config from a state that was written with `old`; returns whether the stream is the same."""
    reader = SimpleNamespace(config=old, vocabulary=VOCABULARY, folder=SimpleNamespace(name="step-00000005"))
    return check_changes(reader, stream.config, stream, state, list(allowed))


@pytest.mark.parametrize("section", ["data", "cm3", "retrieval"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_new_field_keeps_the_identity_at_its_default_and_is_named_at_another_value(
    corpora, section, version, monkeypatch
):
    name = f"{section}.new_field"
    monkeypatch.setitem(loading._SETTINGS, name, Setting(resume="fixed"))

    @dataclass(kw_only=True)
    class Extended({"data": DataConfig, "cm3": CM3Config, "retrieval": RetrievalConfig}[section]):
        new_field: list[int] = field(default_factory=lambda: [1])

    plain = make_config()
    state = make_state(make_stream(plain, corpora[0]), version)
    config, old = make_config(), make_config()
    for each in (config, old):
        setattr(each, section, Extended(**vars(getattr(each, section))))
    stream = make_stream(config, corpora[0])
    assert stream.identity == make_stream(plain, corpora[0]).identity
    assert resume(stream, state, old) and state.changes == []
    getattr(config, section).new_field = [2]
    assert stream.identity != make_stream(plain, corpora[0]).identity
    with pytest.raises(ValueError, match=rf"{name} \(\[2\]\) was \[1\] in .*--allow-change {name}"):
        resume(stream, state, old)
    assert not resume(stream, state, old, name)
    assert state.changes == [{"step": 5, "batch": 5, "field": name, "old": [1], "new": [2]}]


@pytest.mark.parametrize("version", [1, 2])
def test_different_data_are_rejected_and_named(corpora, version):
    config = make_config("data.shards=here", "retrieval.index=table")
    state = make_state(make_stream(config, corpora[0]), version)
    with pytest.raises(ValueError, match=r"the shards .*are not those of .*--allow-change data.shards"):
        resume(make_stream(config, corpora[1]), state, config)
    with pytest.raises(ValueError, match=r"index.*--allow-change (data.shards|retrieval.index)"):
        resume(make_stream(config, corpora[0], neighbors=False), state, config)
    assert not resume(make_stream(config, corpora[1]), state, config, "data.shards")
    assert [change["field"] for change in state.changes] == ["data.shards"]


def test_identity_version_2_names_the_part_of_the_data_that_differs(corpora):
    config = make_config("data.shards=here", "retrieval.index=table")
    stream, without_retrieval = make_stream(config, corpora[0]), make_stream(config, corpora[0], neighbors=False)
    state = make_state(stream)
    stream.samples.sources[0].neighbors.table = np.roll(stream.samples.sources[0].neighbors.table, 1, 0)
    with pytest.raises(ValueError, match=r"the index at table is not that of .*--allow-change retrieval.index"):
        resume(stream, state, config)
    with pytest.raises(ValueError, match=r"here has no index, and had one in"):
        resume(without_retrieval, state, config)
    with pytest.raises(ValueError, match=r"here has the index table, and had none in"):
        resume(stream, make_state(without_retrieval), config)
    assert not resume(stream, state, config, "retrieval.index")
    state = make_state(make_stream(config, corpora[0]))
    state.stream_parts["stream_version"] = 0
    with pytest.raises(
        ValueError, match=r"different sequences from the same data \(stream version 1\) than .* version 0\)"
    ):
        resume(stream, state, config)


@pytest.mark.parametrize("version", [1, 2])
def test_different_weights_of_sources_are_rejected_and_named(corpora, version):
    ratios = {name: f"data.sources=[{{shards: a, weight: {name}}}, {{shards: b}}]" for name in (2, 3)}
    configs = {name: make_config(text) for name, text in ratios.items()}
    streams = {name: make_stream(config, corpora[0], False, [name, 1]) for name, config in configs.items()}
    state = make_state(streams[2], version)
    assert resume(streams[2], state, configs[2])
    with pytest.raises(ValueError, match=r"weights of data.sources have the ratio \[3, 1\], and had \[2, 1\] in"):
        resume(streams[3], state, configs[2])
    assert not resume(streams[3], state, configs[2], "data.sources")


@pytest.mark.parametrize("version", [1, 2])
def test_retrieval_can_be_disabled_and_enabled(corpora, version):
    with_retrieval, without_retrieval = make_config(), make_config("retrieval.documents=0")
    streams = make_stream(with_retrieval, corpora[0]), make_stream(without_retrieval, corpora[0], neighbors=False)
    assert not resume(streams[1], make_state(streams[0], version), with_retrieval, "retrieval.documents")
    assert not resume(streams[0], make_state(streams[1], version), without_retrieval, "retrieval.documents")


@pytest.mark.parametrize("version", [1, 2])
def test_another_batch_size_requires_allow_change_and_keeps_the_position(corpora, version, caplog):
    old, config = make_config(), make_config("train.global_batch_size=16")
    state = make_state(make_stream(old, corpora[0]), version)
    state.sequence = 160
    stream = make_stream(config, corpora[0])
    with pytest.raises(ValueError, match=r"train.global_batch_size \(16\) was 32 in .* --allow-change train.glob"):
        resume(stream, state, old)
    caplog.set_level(logging.INFO)
    assert resume(stream, state, old, "train.global_batch_size"), "the same sequences"
    assert (state.batch, state.sequence) == (5, 160)
    assert "continues at sequence 160 with batches of 16 sequences instead of 32: no sample is skipped" in caplog.text


@pytest.mark.parametrize(
    ("packing", "field", "moves_position"),
    [("query", "cm3.probability=0.5", False), ("stream", "cm3.probability=0.5", False),
     ("query", "retrieval.documents=1", False), ("stream", "retrieval.documents=1", True),
     ("query", "seed=7", True)],
)  # fmt: skip
def test_a_change_of_the_position_in_the_data_is_logged(corpora, packing, field, moves_position, caplog):
    old, config = make_config(f"data.packing={packing}"), make_config(f"data.packing={packing}", field)
    name = field.partition("=")[0]
    caplog.set_level(logging.INFO)
    assert not resume(make_stream(config, corpora[0]), make_state(make_stream(old, corpora[0])), old, name)
    assert (f"another position in the data because {name} changed" in caplog.text) == moves_position


def test_allow_change_is_offered_only_for_changes_that_can_work(corpora, tmp_path):
    for family, overrides in (("cm3leon", []), ("llama", ["model.family=llama", "model.ffn_hidden_size=16"])):
        old = make_config(*overrides, "data.packing=stream")
        reader = CheckpointReader(write_random_checkpoint(tmp_path / family, old, VOCABULARY))

        def change(*more, old=old, overrides=overrides, reader=reader, allowed=()):
            config = make_config(*overrides, "data.packing=stream", *more)
            state = make_state(make_stream(old, corpora[0]))
            return check_changes(reader, config, make_stream(config, corpora[0]), state, list(allowed))

        for length in (80, 30):
            if family == "cm3leon":
                with pytest.raises(
                    ValueError, match=r"has 40 learned positions .* resume with data.seq_length=40"
                ) as error:
                    change(f"data.seq_length={length}", "cm3.probability=0.5", allowed=["data.seq_length"])
                assert "--allow-change" not in str(error.value)
            else:
                with pytest.raises(ValueError, match=r"--allow-change data.seq_length"):
                    change(f"data.seq_length={length}")
                assert not change(f"data.seq_length={length}", allowed=["data.seq_length"])
        for override in (
            "model.layers=2",
            "model.hidden_size=16",
            f"model.family={'llama' if family == 'cm3leon' else 'cm3leon'}",
        ):
            with pytest.raises(ValueError, match=r"changes the shapes of the parameters; resume with model") as error:
                change(override)
            assert "--allow-change" not in str(error.value) and override.partition("=")[0] in str(error.value)
        with pytest.raises(ValueError, match=r"--allow-change model.dropout"):
            change("model.dropout=0.1")
