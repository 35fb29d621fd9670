"""Asynchronous writing: the same bytes as synchronous writing, the values at the time of save(), and errors."""

import errno
import shutil
import threading
import time

import pytest
import torch

from megatron_cm3leon.checkpoint import sharded, writer
from megatron_cm3leon.checkpoint.format import list_checkpoints, step_folder, temporary_folder
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.checkpoint.writer import CheckpointWriter
from megatron_cm3leon.config.loading import Config
from tests.checkpoint.builders import FULL_TENSOR, make_pieces, run_ranks, write_checkpoint
from tests.data.corpora import make_vocabulary


def save(checkpoint_writer, run, step=3, pieces=None, **changed):
    values = {"config": Config(), "vocabulary": make_vocabulary(), "state": TrainState(step=step)} | changed
    pieces = make_pieces(0) if pieces is None else pieces
    checkpoint_writer.save(step_folder(run, step), iter(pieces), versions={"torch": "x"}, **values)


def build_writer(**options):
    return CheckpointWriter(0, 1, lambda: None, **options)


@pytest.fixture
def allow_writing(monkeypatch):
    """An event: files are written only after it is set."""
    event, write = threading.Event(), sharded.write_rank_file

    def wait_and_write(*arguments):
        assert event.wait(30)
        write(*arguments)

    monkeypatch.setattr(sharded, "write_rank_file", wait_and_write)
    yield event
    event.set()


def test_asynchronous_and_synchronous_checkpoints_have_the_same_bytes(tmp_path):
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    contents = []
    for asynchronous in (True, False):
        run, barrier = tmp_path / str(asynchronous), threading.Barrier(3)

        def save_one(rank, run=run, barrier=barrier, asynchronous=asynchronous):
            checkpoint_writer = CheckpointWriter(rank, 3, barrier.wait, asynchronous=asynchronous)
            save(checkpoint_writer, run, pieces=make_pieces(rank, kinds=kinds))
            checkpoint_writer.close()

        assert run_ranks(3, save_one) == [None] * 3
        folder = step_folder(run, 3)
        assert torch.equal(CheckpointReader(folder).read("w", "exp_avg_sq"), FULL_TENSOR)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3 + 4


def test_changes_after_save_are_not_written(tmp_path, allow_writing):
    weights, state, config = FULL_TENSOR.clone(), TrainState(step=3, skipped=[1]), Config()
    checkpoint_writer = build_writer()
    position = make_pieces(0)[0][0]
    save(checkpoint_writer, tmp_path, pieces=[(position, weights[:3].view(-1))], state=state, config=config)
    checkpoint_writer.wait_for_copy()
    weights.fill_(-1)
    state.step, config.seed = 4, 5
    state.skipped.append(2)
    allow_writing.set()
    checkpoint_writer.close()
    reader = CheckpointReader(step_folder(tmp_path, 3))
    assert torch.equal(reader.read_part("w", "weight", (0, 0), (3, 4)), FULL_TENSOR[:3])
    assert reader.state == TrainState(step=3, skipped=[1]) and reader.config.seed == Config().seed


def test_tensors_may_change_only_after_they_are_copied(tmp_path, allow_writing, monkeypatch):
    weights, copying, copy_pieces = FULL_TENSOR.clone(), threading.Event(), writer._Buffer._copy

    def copy_late(*arguments, **options):
        assert copying.wait(30)
        return copy_pieces(*arguments, **options)

    monkeypatch.setattr(writer._Buffer, "_copy", copy_late)
    checkpoint_writer = build_writer()
    position = make_pieces(0)[0][0]
    save(checkpoint_writer, tmp_path, pieces=[(position, weights[:3].view(-1))])
    optimizer = threading.Thread(target=lambda: (checkpoint_writer.wait_for_copy(), weights.fill_(-1)))
    optimizer.start()
    optimizer.join(0.2)
    assert optimizer.is_alive() and torch.equal(weights, FULL_TENSOR)
    copying.set()
    optimizer.join(30)
    assert torch.equal(weights, torch.full_like(FULL_TENSOR, -1))
    allow_writing.set()
    checkpoint_writer.close()
    assert torch.equal(
        CheckpointReader(step_folder(tmp_path, 3)).read_part("w", "weight", (0, 0), (3, 4)), FULL_TENSOR[:3]
    )


def test_save_returns_immediately_and_the_checkpoint_is_listed_when_complete(tmp_path, allow_writing):
    checkpoint_writer = build_writer()
    assert checkpoint_writer.poll()
    save(checkpoint_writer, tmp_path)
    assert not checkpoint_writer.poll() and list_checkpoints(tmp_path) == []
    allow_writing.set()
    checkpoint_writer.wait()
    assert checkpoint_writer.poll() and list_checkpoints(tmp_path) == [step_folder(tmp_path, 3)]


def test_a_synchronous_save_is_on_disk_when_it_returns(tmp_path):
    save(build_writer(asynchronous=False), tmp_path)
    assert list_checkpoints(tmp_path) == [step_folder(tmp_path, 3)]


def test_a_save_waits_for_the_previous_one(tmp_path, allow_writing):
    checkpoint_writer = build_writer()
    save(checkpoint_writer, tmp_path, 1)
    second = threading.Thread(target=save, args=(checkpoint_writer, tmp_path, 2))
    second.start()
    time.sleep(0.05)
    assert second.is_alive() and not temporary_folder(step_folder(tmp_path, 2)).exists()
    allow_writing.set()
    second.join(30)
    assert step_folder(tmp_path, 1) in list_checkpoints(tmp_path)
    checkpoint_writer.close()
    assert len(list_checkpoints(tmp_path)) == 2


def test_memory_is_reused_and_grows_with_the_moments(tmp_path):
    checkpoint_writer, buffers = build_writer(), []
    for step, kinds in ((0, ("weight",)), (1, ("weight", "exp_avg")), (2, ("weight", "exp_avg"))):
        save(checkpoint_writer, tmp_path, step, make_pieces(0, kinds=kinds))
        checkpoint_writer.wait()
        buffers.append((checkpoint_writer._buffer._numbers.data_ptr(), checkpoint_writer._buffer._numbers.numel()))
    assert buffers[1] == buffers[2] and [count for _, count in buffers] == [12, 24, 24]


def simulate_full_disk(monkeypatch, name="rank-00000"):
    """Simulate a disk that is full after the header of a file whose name contains `name`."""
    write = sharded._write_fully

    def fail(file, block):
        if name in str(file.name) and file.tell():
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        write(file, block)

    monkeypatch.setattr(sharded, "_write_fully", fail)


def test_poll_raises_the_error_of_a_full_disk_with_path_and_remedy(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1)
    checkpoint_writer = build_writer()
    with monkeypatch.context() as patch:
        simulate_full_disk(patch)
        save(checkpoint_writer, tmp_path)
        message = r"rank-00000.safetensors: No space left on device; free disk space .* resumes from .*step-00000001\)"
        with pytest.raises(ValueError, match=message):
            while not checkpoint_writer.poll():
                time.sleep(0.01)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert not list(temporary_folder(step_folder(tmp_path, 3)).glob("*.safetensors"))  # disk space was freed
    assert checkpoint_writer.poll()  # raised once
    save(checkpoint_writer, tmp_path)
    checkpoint_writer.close()
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def test_a_synchronous_save_raises_the_error_of_a_full_disk(tmp_path, monkeypatch):
    simulate_full_disk(monkeypatch)
    with pytest.raises(ValueError, match=r"No space left on device.*the run has no checkpoint yet"):
        save(build_writer(asynchronous=False), tmp_path)


def test_the_first_rank_reports_a_full_disk_of_another_rank(tmp_path, monkeypatch):
    simulate_full_disk(monkeypatch, "rank-00001")
    barrier = threading.Barrier(2)

    def save_one(rank):
        checkpoint_writer = CheckpointWriter(rank, 2, barrier.wait)
        save(checkpoint_writer, tmp_path, pieces=make_pieces(rank))
        checkpoint_writer.close()

    first, second = run_ranks(2, save_one)
    assert "was not written: rank-00001 failed with" in str(first) and "No space left on device" in str(first)
    assert "rank-00001.safetensors: No space left on device" in str(second)
    assert list_checkpoints(tmp_path) == []


def test_a_file_where_a_folder_is_required_is_named(tmp_path, allow_writing):
    checkpoint_writer = build_writer()
    save(checkpoint_writer, tmp_path)
    temporary = temporary_folder(step_folder(tmp_path, 3))
    shutil.rmtree(temporary)
    temporary.write_text("a file")
    allow_writing.set()
    with pytest.raises(ValueError, match=r"step-00000003.tmp/rank-00000.safetensors: Not a directory"):
        checkpoint_writer.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(ValueError, match=r"was not written: .*checkpoints.*choose another with output="):
        save(checkpoint_writer, tmp_path, 4)


def test_the_first_rank_stops_waiting_for_ranks_that_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SECONDS_WITHOUT_GROWTH", 0.1)
    checkpoint_writer = CheckpointWriter(0, 3, lambda: None)
    save(checkpoint_writer, tmp_path)
    with pytest.raises(ValueError, match=r"rank 1 \(2 ranks in total\) wrote nothing for"):
        checkpoint_writer.wait()


@pytest.mark.parametrize("stage", ["save_config", "add_checksum", "_sync"])
def test_an_interrupted_finish_leaves_the_previous_checkpoint_as_the_newest(tmp_path, monkeypatch, stage):
    write_checkpoint(tmp_path, 1)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sharded, stage, stop)
    checkpoint_writer = build_writer()
    save(checkpoint_writer, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_writer.wait()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


def test_reserved_memory_is_used_by_every_save(tmp_path):
    checkpoint_writer = build_writer()
    checkpoint_writer.reserve(24, torch.device("cpu"))
    for step, kinds in ((0, ("weight",)), (1, ("weight", "exp_avg"))):
        save(checkpoint_writer, tmp_path, step, make_pieces(0, kinds=kinds))
        checkpoint_writer.wait()
        assert checkpoint_writer._buffer._numbers.numel() == 24
    assert torch.equal(
        CheckpointReader(step_folder(tmp_path, 1)).read_part("w", "exp_avg", (0, 0), (3, 4)), FULL_TENSOR[:3]
    )
    checkpoint_writer.close()
    assert checkpoint_writer._buffer._numbers.numel() == 0
