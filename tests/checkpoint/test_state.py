"""TrainState in state.json, and states of earlier and later versions."""

import json

import pytest

from megatron_cm3leon.checkpoint.state import TrainState
from tests.golden.formats import make_state


def test_a_state_reads_back_equal(tmp_path):
    state = make_state()
    state.init = {"path": "runs/base", "step": 3}
    state.save(tmp_path / "state.json")
    assert TrainState.load(tmp_path / "state.json", global_batch_size=8) == state
    assert all(state.to_dict().values()), "a difference in an empty field would not be found"


def test_the_position_of_an_older_state_is_counted_in_batches():
    old = {key: value for key, value in make_state().to_dict().items() if key not in ("sequence", "stream_parts")}
    state = TrainState.from_dict(json.loads(json.dumps(old)), global_batch_size=8)
    assert (state.batch, state.sequence, state.stream_parts) == (14, 112, {})
    assert TrainState.from_dict({"step": 3, "batch": 3}, 8).tokens == 0


def test_a_newer_state_is_rejected():
    with pytest.raises(ValueError, match="unknown key 'warp'; a newer version of megatron_cm3leon wrote it"):
        TrainState.from_dict({"step": 1, "warp": 9}, 8)
