"""The sequences of a batch in runs that changed their batch size or their stream."""

import json

import pytest

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import load_config, save_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.monitoring.positions import find_sequences
from tests.checkpoint.builders import make_pieces
from tests.data.corpora import make_vocabulary


def make_config(size, *more):
    config = load_config(None, [f"train.global_batch_size={size}", *more])
    validate_config(config)
    return config


def write_run(run, config, lines, checkpoint=None, changes=(), saved=None):
    """A run folder: lines (step, batch) or (step, batch, first, count), and a checkpoint at a step."""
    run.mkdir(exist_ok=True)
    save_config(config, run / "config.yaml")
    keys = ("step", "batch", "first_sequence", "sequences")
    rows = [{"attempt": 1, **dict(zip(keys, line, strict=False))} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if checkpoint:
        folder = step_folder(run, checkpoint)
        sharded.begin_checkpoint(folder)
        sharded.write_rank_file(folder, 0, make_pieces(0))
        state = TrainState(step=checkpoint, batch=checkpoint, changes=list(changes))
        sharded.finish_checkpoint(folder, saved or config, make_vocabulary(), state, {})


def find(run, config, *batches):
    return [(found.start, len(found)) for found, _ in (find_sequences(run, config, batch) for batch in batches)]


def test_a_run_with_one_batch_size(tmp_path):
    config = make_config(4)
    assert find(tmp_path, config, 0, 3) == [(0, 4), (12, 4)]
    write_run(tmp_path / "old", config, [(1, 0), (2, 1)])
    assert find(tmp_path / "old", config, 0, 1, 2, 5) == [(0, 4), (4, 4), (8, 4), (20, 4)]
    write_run(tmp_path / "new", config, [(1, 0, 0, 4), (2, 1, 4, 4)])
    assert find(tmp_path / "new", config, 0, 1, 2, 5) == [(0, 4), (4, 4), (8, 4), (20, 4)]


def test_recorded_positions_are_used_and_continue_from_the_last_line(tmp_path):
    config = make_config(8)
    write_run(tmp_path / "run", config, [(1, 0, 0, 4), (2, 1, 4, 4), (3, 2, 8, 8), (4, 3, 16, 8)])
    assert find(tmp_path / "run", config, 1, 2, 3, 4, 6) == [(4, 4), (8, 8), (16, 8), (24, 8), (40, 8)]


def test_lines_without_positions_use_the_batch_size_of_their_step(tmp_path):
    """Lines without positions up to step 2 with 4 sequences, to step 4 with 8: the second change is not saved yet."""
    change = {"step": 2, "field": "train.global_batch_size", "old": 4, "new": 8}
    run, lines = tmp_path / "run", [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4, 32, 16)]
    write_run(run, make_config(16), lines, checkpoint=4, changes=[change], saved=make_config(8))
    assert find(run, make_config(16), 0, 1, 2, 3, 4, 5) == [(0, 4), (4, 4), (16, 8), (24, 8), (32, 16), (48, 16)]


def test_a_batch_uses_the_stream_settings_of_its_step(tmp_path):
    changes = [
        {"step": 1, "batch": 2, "field": "cm3.probability", "old": 1.0, "new": 0.5},
        {"step": 2, "batch": 3, "field": "cm3.probability", "old": 0.5, "new": 0.25},
        {"step": 2, "batch": 3, "field": "seed", "old": 1, "new": 2},
    ]
    config = make_config(4, "cm3.probability=0.25", "seed=2")
    run, lines = tmp_path / "run", [(1, 0, 0, 4), (1, 1, 4, 4), (2, 2, 8, 4), (2, 3, 12, 4), (3, 4, 16, 4)]
    write_run(run, config, lines, checkpoint=3, changes=changes)
    found = [find_sequences(run, config, batch)[1] for batch in range(6)]
    assert [each.cm3.probability for each in found] == [1.0, 1.0, 0.5, 0.25, 0.25, 0.25]
    assert [each.seed for each in found] == [1, 1, 1, 2, 2, 2]


def test_a_batch_from_other_shards_is_an_error(tmp_path):
    change = {"step": 1, "batch": 1, "field": "data.shards", "old": "hash", "new": "hash"}
    config = make_config(4)
    write_run(tmp_path / "run", config, [(1, 0, 0, 4), (2, 1, 4, 4)], checkpoint=2, changes=[change])
    assert find(tmp_path / "run", config, 1, 2) == [(4, 4), (8, 4)]
    with pytest.raises(ValueError, match=r"batch 0 of .* is from other data: data.shards changed at step 1"):
        find_sequences(tmp_path / "run", config, 0)
