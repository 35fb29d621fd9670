"""The loader: the same batches for any ranks, workers and micro-batches, from any start; errors name their cause."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.data.stream.stream import Stream
from tests.data.corpora import make_neighbors, make_pairs, make_vocabulary, write_shards

V = make_vocabulary()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", make_pairs(60, V), V)


@pytest.fixture(scope="module", params=["query", "stream", "stream_whole_images", "documents"])
def stream(request, corpus):
    config = Config()
    config.data.packing, config.data.seq_length, config.train.global_batch_size = request.param, 64, 8
    return Stream(config, corpus, make_neighbors(corpus))


def take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("size, micro, workers", [(1, 8, 0), (1, 1, 1), (2, 2, 0), (4, 1, 2)])
def test_every_layout_sees_the_same_batches(stream, size, micro, workers):
    ranks = [
        take(Loader(stream, rank=rank, size=size, micro_batch_size=micro, workers=workers), 3) for rank in range(size)
    ]
    for b in range(3):
        expected = stream.batch(b)
        batches = [batch for rank in ranks for batch in rank[b][1]]
        assert [rank[b][0] for rank in ranks] == [b] * size
        tokens = np.stack([sequence.tokens for sequence in expected])
        weights = np.stack([sequence.weights for sequence in expected])
        assert torch.cat([batch.tokens for batch in batches]).tolist() == tokens[:, :-1].tolist()
        assert torch.cat([batch.labels for batch in batches]).tolist() == tokens[:, 1:].tolist()
        assert torch.cat([batch.loss_weights for batch in batches]).tolist() == weights[:, 1:].tolist()
        assert sum(batch.trimmed for batch in batches) == sum(sequence.trimmed for sequence in expected)
        for batch in batches:
            assert batch.tokens.shape == (micro, 64) and batch.tokens.dtype == torch.int64
            assert batch.position_ids.tolist() == [list(range(64))] * micro
            assert batch.loss_weights.dtype == torch.float32 and batch.tokens.is_contiguous()


def test_starting_at_a_batch_equals_continuing_from_the_first(stream):
    first = take(Loader(stream, micro_batch_size=8), 30)
    later = take(Loader(stream, micro_batch_size=8, start_batch=23, workers=2, prefetch=2), 7)
    for (b, batches), (c, others) in zip(first[23:], later, strict=True):
        assert b == c and torch.equal(batches[0].tokens, others[0].tokens)
    assert stream.sequence(29 * 8).epoch > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_another_batch_size_continues_at_the_next_sequence(stream, workers):
    """After 3 batches of 8, batches of 16, then of 4: every sequence is read once."""
    loaders = [
        Loader(stream, rank=rank, size=2, micro_batch_size=2, global_batch_size=size, workers=workers, **start)
        for size, start in (
            (16, {"start_batch": 3, "start_sequence": 24}),
            (4, {"start_batch": 5, "start_sequence": 56}),
        )
        for rank in range(2)
    ]
    first, second, third, fourth = (take(loader, 2) for loader in loaders)
    assert [number for number, _ in first + third] == [3, 4, 5, 6]
    tokens = [
        batch.tokens for parts in ((first, second), (third, fourth)) for pair in zip(*parts, strict=True)
        for _, batches in pair for batch in batches
    ]  # fmt: skip
    expected = np.stack([sequence.tokens[:-1] for sequence in stream.sequences(24, 64)])
    assert np.array_equal(torch.cat(tokens).numpy(), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_stream_continues_from_a_cursor(stream, corpus, workers, monkeypatch):
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek.GROUP", 8)
    first = Stream(stream.config, corpus, make_neighbors(corpus))
    expected = take(Loader(first, micro_batch_size=8), 21)[20][1][0]
    loader = Loader(Stream(stream.config, corpus, make_neighbors(corpus)), micro_batch_size=8, workers=workers)
    take(loader, 20)
    resumed = Stream(stream.config, corpus, make_neighbors(corpus))
    resumed.resume(json.loads(json.dumps(loader.cursor)))
    # Without a table the position can only be found from the cursor.
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek.PrefixSums._build", None)
    monkeypatch.setattr("megatron_cm3leon.data.stream.seek._WALK", 12)
    batch = take(Loader(resumed, micro_batch_size=8, start_batch=20), 1)[0][1][0]
    assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.labels, expected.labels)


def test_a_batch_size_that_is_not_divisible_by_the_ranks_is_refused(stream):
    with pytest.raises(ValueError, match=r"train.global_batch_size \(8\) must be divisible by .* \(3\)"):
        Loader(stream, size=3)


def list_children():
    return psutil.Process().children(recursive=True)


def test_close_leaves_no_process(stream):
    before = len(list_children())
    loader = Loader(stream, micro_batch_size=8, workers=2)
    next(loader)
    assert len(list_children()) > before
    loader.close()
    loader.close()
    assert len(list_children()) == before
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_worker_raises_an_error_with_the_cause(stream, which):
    before = len(list_children())
    loader = Loader(stream, micro_batch_size=8, workers=2, prefetch=1)
    next(loader)
    os.kill(loader.workers[which].process.pid, signal.SIGKILL)
    started = time.monotonic()
    message = r"loader worker .* preparing batch \d+ died: killed by signal 9, SIGKILL.*data\.workers"
    with pytest.raises(RuntimeError, match=message):
        for _ in range(20):
            next(loader)
    assert time.monotonic() - started < 5
    assert len(list_children()) == before


PROGRAM = """
import os, sys
from pathlib import Path
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.data.stream.stream import build_stream

config = Config()
config.data.shards, config.data.seq_length, config.train.global_batch_size = sys.argv[1], 64, 8
loader = Loader(build_stream(config), workers=2, micro_batch_size=8)
next(loader)
print(*[worker.process.pid for worker in loader.workers], flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_workers_end_with_a_program_that_does_not_close_its_loader(corpus, ending):
    command = [sys.executable, "-c", PROGRAM, str(corpus.folder), ending]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == (0 if ending == "exit" else -signal.SIGKILL)
    pids = [int(pid) for pid in result.stdout.split()]
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_names_a_damaged_shard(tmp_path, workers):
    corpus = write_shards(tmp_path, make_pairs(10, V), V)
    tar = tmp_path / "shard-000000-000.tar"
    content = bytearray(tar.read_bytes())
    for offset in np.load(tmp_path / "shard-000000-000.idx.npy")["offset"].tolist():
        content[offset] ^= 1
    tar.write_bytes(content)
    config = Config()
    config.data.seq_length, config.train.global_batch_size = 64, 2
    loader = Loader(Stream(config, corpus), workers=workers)
    with pytest.raises(ValueError, match=r"^batch 0: document \d+ \(row \d+ of .*\.tar\) is damaged") as caught:
        next(loader)
    assert "Traceback" not in str(caught.value)
