"""Sharded checkpoints: parts of tensors from any pieces, only complete folders are listed, damaged files are named."""

import json

import pytest
import torch

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import list_checkpoints, step_folder
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.config.loading import Config
from tests.checkpoint.builders import FULL_TENSOR, write_checkpoint
from tests.data.corpora import make_vocabulary


def test_full_tensors_and_parts_are_read(tmp_path):
    folder = write_checkpoint(tmp_path)
    reader = CheckpointReader(folder)
    assert reader.names == ["w"] and reader.shape("w") == (6, 4)
    assert torch.equal(reader.read("w"), FULL_TENSOR)
    assert torch.equal(reader.read_part("w", "weight", (2, 1), (3, 2)), FULL_TENSOR[2:5, 1:3])


def test_rows_beyond_the_edge_are_zero(tmp_path):
    folder = write_checkpoint(tmp_path)
    part = CheckpointReader(folder).read_part("w", "weight", (4, 0), (4, 4))
    assert torch.equal(part[:2], FULL_TENSOR[4:]) and not part[2:].any()
    assert not CheckpointReader(folder).read_part("w", "weight", (8, 0), (4, 4)).any()


def test_state_config_and_vocabulary_are_stored(tmp_path):
    reader = CheckpointReader(write_checkpoint(tmp_path))
    assert reader.state.step == 3
    assert reader.vocabulary == make_vocabulary()
    assert reader.config.cm3 == Config().cm3
    assert list(reader.verify()) == list(reader.manifest["files"])


def test_a_checkpoint_is_listed_only_when_it_is_complete(tmp_path):
    folder = step_folder(tmp_path, 5)
    sharded.begin_checkpoint(folder)
    assert list_checkpoints(tmp_path) == []
    assert not (tmp_path / "latest").exists()
    write_checkpoint(tmp_path, step=5)
    assert list_checkpoints(tmp_path) == [folder]
    assert (tmp_path / "latest").read_text() == "step-00000005\n"


def test_a_damaged_file_is_named(tmp_path):
    folder = write_checkpoint(tmp_path)
    file = folder / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors does not match its SHA-256"):
        list(CheckpointReader(folder).verify())
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"rank-00001.safetensors has \d+ bytes, \d+ bytes were written"):
        CheckpointReader(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors is missing"):
        CheckpointReader(folder)


def test_missing_numbers_are_counted(tmp_path):
    folder = write_checkpoint(tmp_path, ranks=1)
    with pytest.raises(ValueError, match="12 numbers of weight w are missing"):
        CheckpointReader(folder).read("w")


def test_a_folder_that_is_not_a_checkpoint_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        CheckpointReader(tmp_path)
    folder = write_checkpoint(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="format 99 is not supported; this version reads format 1"):
        CheckpointReader(folder)


def test_a_missing_parameter_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no weight of decoder.x; it was written by another model"):
        CheckpointReader(write_checkpoint(tmp_path)).read("decoder.x")
