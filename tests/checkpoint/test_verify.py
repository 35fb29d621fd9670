"""Checksums during loading: every file once per node; damage is reported on every rank with the previous checkpoint."""

import threading

import pytest
import torch

from megatron_cm3leon.checkpoint import format as checkpoint_format
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.verify import verify_while_reading
from tests.checkpoint.builders import FULL_TENSOR, flip_byte, run_ranks, write_checkpoint

PARTS = [[("w", (0, 0), (6, 2))], [("w", (0, 2), (6, 2))]]  # each rank reads both files


class World:
    """All-gather of two ranks, which are threads on one node."""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(2), [None, None]

    def gather(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait(20)
            values = list(self.values)
            self.barrier.wait(20)
            return values

        return gather


def load(folder, fail_on=None):
    world = World()

    def load_one(rank):
        reader = CheckpointReader(folder)
        with verify_while_reading(reader, reader.list_files(PARTS[rank]), world.gather(rank)):
            part = reader.read_part(PARTS[rank][0][0], "weight", *PARTS[rank][0][1:])
            if rank == fail_on:
                raise ValueError("wrong shape")
        return part

    return run_ranks(2, load_one)


def test_every_file_is_hashed_once_by_the_ranks_of_a_node(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path)
    hashed, hash_file = [], checkpoint_format.hash_file
    monkeypatch.setattr(checkpoint_format, "hash_file", lambda path, *more: hashed.append(path.name) or hash_file(path))
    parts = load(folder)
    assert torch.equal(torch.cat(parts, 1), FULL_TENSOR)
    assert sorted(hashed) == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_only_files_that_are_read_are_hashed(tmp_path):
    folder = write_checkpoint(tmp_path)
    flip_byte(folder / "rank-00001.safetensors")
    reader = CheckpointReader(folder)
    assert reader.list_files([("w", (0, 0), (3, 4))]) == {"rank-00000.safetensors"}
    assert torch.equal(reader.read_part("w", "weight", (0, 0), (3, 4)), FULL_TENSOR[:3])
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors does not match its SHA-256"):
        reader.read("w")


def test_damage_is_reported_on_every_rank_before_other_errors(tmp_path):
    previous = write_checkpoint(tmp_path, 2)
    folder = write_checkpoint(tmp_path, 5)
    flip_byte(folder / "rank-00000.safetensors")
    for errors in (load(folder), load(folder, fail_on=0)):
        for error in errors:
            assert "rank-00000.safetensors does not match its SHA-256" in str(error)
            assert f"The previous checkpoint is {previous}:" in str(error)
            assert f"mv {folder} {folder}.damaged" in str(error)


def test_an_error_on_one_rank_stops_all_ranks(tmp_path):
    assert [str(error) for error in load(write_checkpoint(tmp_path), fail_on=1)] == ["wrong shape"] * 2


def test_an_incomplete_checkpoint_names_the_last_complete_one(tmp_path):
    complete, partial, newest = (write_checkpoint(tmp_path, step) for step in (1, 2, 3))
    (partial / "rank-00001.safetensors").unlink()
    (newest / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"no manifest.json.*The previous checkpoint is {complete}:"):
        CheckpointReader(newest)
    with pytest.raises(ValueError, match=r"rank-00001.safetensors is missing.*The previous checkpoint"):
        CheckpointReader(partial)
    (complete / "state.json").unlink()
    with pytest.raises(
        ValueError, match="no complete checkpoint before it: to start the run from the beginning, rename"
    ):
        CheckpointReader(newest)


@pytest.mark.parametrize("name", ["config.yaml", "vocab.json", "state.json"])
def test_small_files_are_verified(tmp_path, name):
    folder = write_checkpoint(tmp_path)
    flip_byte(folder / name, 10)
    reader = CheckpointReader(folder)
    with pytest.raises(ValueError, match=f"{name} does not match its SHA-256"):
        _ = reader.config, reader.vocabulary, reader.state
