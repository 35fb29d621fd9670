"""Disks that fill up, are read-only or disappear: the run ends with an error, and saved checkpoints remain."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from megatron_cm3leon.checkpoint.format import list_checkpoints, step_folder
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.checkpoint.verify import verify_while_reading
from megatron_cm3leon.checkpoint.writer import CheckpointWriter
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.data.stream.stream import build_stream
from tests.checkpoint.builders import make_pieces, write_checkpoint
from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.distributed.launch import ROOT


def save(run, step, pieces=None):
    writer = CheckpointWriter(0, 1, lambda: None)
    state = TrainState(step=step)
    writer.save(step_folder(run, step), pieces or make_pieces(0), Config(), make_vocabulary(), state, {})
    writer.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB; skipped where none can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_during_a_save_keeps_earlier_checkpoints(small_disk):
    save(small_disk, 1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(40 << 10))
    piece = make_pieces(0)[0][0]
    tensor = torch.zeros(12, 1000)
    larger = type(piece)("w", "weight", (12, 1000), (0, 0), (12, 1000), 0, tensor.numel())
    message = r"step-00000002 was not written: .*rank-00000.safetensors: No space left on device; free disk space .*"
    with pytest.raises(ValueError, match=message + r"resumes from .*step-00000001\)"):
        save(small_disk, 2, [(larger, tensor.view(-1))])
    assert torch.equal(CheckpointReader(step_folder(small_disk, 1)).read_part("w", "weight", (0, 0), (3, 4)),
                       torch.arange(12.0).view(3, 4))  # fmt: skip
    filler.unlink()
    save(small_disk, 2)
    assert [folder.name for folder in list_checkpoints(small_disk)] == ["step-00000001", "step-00000002"]


def test_a_file_size_limit_during_a_save_is_reported(tmp_path):
    write_checkpoint(tmp_path, 1)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"step-00000002 was not written: .*: File too large; free disk space"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]


AS_NOBODY = """
import os, sys
from tests.runtime.test_disks import save
if os.getuid() == 0:
    os.setuid(65534)
try:
    save(sys.argv[1], 2)
except ValueError as error:
    print(error)
"""


def test_a_read_only_checkpoint_folder_is_reported(tmp_path):
    write_checkpoint(tmp_path, 1)
    (tmp_path / "checkpoints").chmod(0o555)
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):  # other users may read, not write
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/pytest"):
            parent.chmod(parent.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, tmp_path], capture_output=True, text=True, cwd=ROOT)
    (tmp_path / "checkpoints").chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "step-00000002 was not written: " in done.stdout
    assert ": Permission denied; free disk space or fix the path, or choose another with output=" in done.stdout
    assert "the run resumes from" in done.stdout


def test_a_checkpoint_deleted_after_listing_is_reported(tmp_path):
    write_checkpoint(tmp_path, 1)
    deleted = write_checkpoint(tmp_path, 2)
    [_, listed] = list_checkpoints(tmp_path)
    reader = CheckpointReader(listed)
    shutil.rmtree(deleted)
    expect_missing_file = pytest.raises(
        ValueError, match=r"step-00000002 is damaged: rank-0000\d.safetensors is missing"
    )
    with expect_missing_file, verify_while_reading(reader, ["rank-00000.safetensors"]):
        reader.read("w")
    with pytest.raises(ValueError, match=r"step-00000002 is not a complete checkpoint"):
        CheckpointReader(listed)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_disappear_during_a_run_are_reported_with_the_batch(tmp_path, workers):
    shards = tmp_path / "shards"
    write_shards(shards, make_pairs(400, make_vocabulary()), make_vocabulary(), shard_documents=2)
    options = ["data.seq_length=32", "train.global_batch_size=2", "data.packing=stream", f"data.shards={shards}"]
    config = load_config(None, [*options, f"output={tmp_path / 'none'}"])
    validate_config(config)
    loader = Loader(build_stream(config), workers=workers, prefetch=1)
    next(loader)
    shards.rename(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"batch \d+: .*shard-\d+-000.tar cannot be opened: No such file or directory"):
        for _ in range(200):
            next(loader)
    loader.close()
