"""Loader: the batches of a stream for one data-parallel rank, prepared ahead in worker processes.

    for b, micro_batches in Loader(stream, rank=0, size=2, micro_batch_size=4, workers=2):

Rank r of `size` gets blocks r * G / size .. (r + 1) * G / size of batch b, in order. Worker w of W prepares
batches start + w, start + w + W ...: the order is fixed, and a worker holds nothing that a batch depends on.

Workers are forked and hand batches over in anonymous shared memory (a ring of `prefetch` slots each), which
leaves no name behind and does not count against /dev/shm. One that dies is noticed at the next batch it
owes; workers end with `close()`, with the interpreter, or within seconds of the training process's death.
They ignore SIGTERM and SIGUSR1: a scheduler's signal to the whole job lets the last steps be finished.
"""

import atexit
import contextlib
import itertools
import json
import mmap
import multiprocessing
import os
import signal
import traceback
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import numpy as np
import torch

from megatron_cm3leon.data.stream import Stream, positions_in_samples

_PARENT_CHECK_SECONDS = 1.0
_READY = b"ready"


@dataclass
class MicroBatch:
    """Blocks of one forward pass; token t + 1 of a block is the label of token t."""

    tokens: torch.Tensor
    """int64 [micro_batch_size, seq_length]."""
    labels: torch.Tensor
    """int64 [micro_batch_size, seq_length]."""
    loss_weights: torch.Tensor
    """Weight of each label's loss, float32 [micro_batch_size, seq_length]."""
    position_ids: torch.Tensor
    """0, 1, 2 ... in every row, or in every sample; int64 [micro_batch_size, seq_length]."""
    samples: torch.Tensor | None
    """Under data.attention=sample: the sample each token is of, int64 [micro_batch_size, seq_length]."""
    trimmed: int
    """Source tokens that masking pushed out of these blocks."""


@dataclass(frozen=True)
class _Slice:
    """The blocks of each batch that one rank gets."""

    stream: Stream
    global_batch_size: int
    first: int
    blocks: int

    def first_block(self, batch: int) -> int:
        return batch * self.global_batch_size + self.first

    def fill(self, batch: int, slot: "_Slot") -> None:
        """Write this rank's part of a batch into a slot."""
        start = self.first_block(batch)
        for row, block in enumerate(self.stream.blocks(start, start + self.blocks)):
            slot.tokens[row], slot.weights[row], slot.trimmed[row] = block.tokens, block.weights, block.trimmed
            if slot.samples is not None:
                slot.samples[row] = block.samples
                slot.positions[row] = positions_in_samples(block.samples)


class _Slot:
    """Memory of one batch, shared between a worker and the training process."""

    def __init__(self, blocks: int, length: int, by_sample: bool) -> None:
        size = blocks * length
        memory = mmap.mmap(-1, blocks * 8 + size * (16 if by_sample else 8))  # anonymous, shared with forked children
        self.trimmed = np.frombuffer(memory, np.int64, blocks)

        def part(number: int, dtype) -> np.ndarray:
            return np.frombuffer(memory, dtype, size, blocks * 8 + number * size * 4).reshape(blocks, length)

        self.tokens, self.weights = part(0, np.int32), part(1, np.float32)
        self.samples, self.positions = (part(2, np.int32), part(3, np.int32)) if by_sample else (None, None)


class _Worker:
    """A process that fills the slots of its ring in turn."""

    def __init__(self, part: _Slice, start: int, step: int, slots: list[_Slot]) -> None:
        context = multiprocessing.get_context("fork")
        self.slots = itertools.cycle(slots)
        self.connection, theirs = context.Pipe()
        arguments = (part, start, step, slots, theirs, os.getpid())
        self.process = context.Process(target=_fill_slots, args=arguments, daemon=True, name="loader")
        self.process.start()
        theirs.close()  # so that the worker's end closes with the worker

    def receive(self, batch: int) -> _Slot:
        """Wait for the next batch; ValueError or OSError of the data, RuntimeError when the worker died."""
        wait([self.connection, self.process.sentinel])
        try:
            message = self.connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(_death(self.process, batch)) from None
        if message == _READY:
            return next(self.slots)
        failure = json.loads(message)
        kinds = {"ValueError": ValueError, "OSError": OSError}
        raise kinds.get(failure["kind"], RuntimeError)(f"batch {batch}: {failure['message']}")

    def release(self) -> None:
        """Give the slot of the last batch back; a worker that died is noticed by `receive`."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(b"")


def _part(array: np.ndarray, rows: slice) -> torch.Tensor:
    """Rows of a slot without their last token, which is a label alone; int64, a copy."""
    return torch.from_numpy(array[rows, :-1].astype(np.int64))


def _death(process: multiprocessing.Process, batch: int) -> str:
    process.join(5)
    code = process.exitcode
    cause = f"exit status {code}"
    if code is not None and code < 0:
        cause = f"killed by signal {-code}, {signal.Signals(-code).name}"
    return (
        f"the loader worker (process {process.pid}) that was preparing batch {batch} died: {cause}. SIGKILL usually "
        f"means that the machine ran out of memory (lower data.workers or data.prefetch), SIGBUS that a shard was "
        f"cut short or its disk failed. Then start the run again: it resumes from its last checkpoint."
    )


def _fill_slots(part: _Slice, start: int, step: int, slots: list[_Slot], connection: Connection, parent: int) -> None:
    """Body of a worker process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        for turn, slot in enumerate(itertools.cycle(slots)):
            if turn >= len(slots):
                while not connection.poll(_PARENT_CHECK_SECONDS):
                    if os.getppid() != parent:
                        return
                connection.recv_bytes()
            part.fill(start + turn * step, slot)
            connection.send_bytes(_READY)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the training process is gone
    except (ValueError, OSError) as error:
        kind = "ValueError" if isinstance(error, ValueError) else "OSError"
        connection.send_bytes(json.dumps({"kind": kind, "message": str(error)}).encode())
    except Exception:
        failure = {"kind": "RuntimeError", "message": f"a loader worker failed:\n{traceback.format_exc()}"}
        connection.send_bytes(json.dumps(failure).encode())


_open_workers: list[list[_Worker]] = []


@atexit.register  # runs before multiprocessing's own, which would wait for children that ignore SIGTERM
def _end_all_workers() -> None:
    for workers in list(_open_workers):
        _end_workers(workers)


def _end_workers(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # it holds nothing that could be lost
    for worker in workers:
        worker.process.join()
        worker.connection.close()
    workers.clear()
    _open_workers[:] = [others for others in _open_workers if others is not workers]


class Loader:
    """Iterates (b, [MicroBatch, ...]) from `start_batch` on, without end."""

    def __init__(
        self, stream: Stream, *, rank: int = 0, size: int = 1, micro_batch_size: int = 1,
        global_batch_size: int | None = None, start_batch: int = 0, workers: int = 0, prefetch: int = 4,
    ) -> None:  # fmt: skip
        """`rank` of `size` data-parallel ranks; each worker prepares up to `prefetch` batches ahead."""
        total = global_batch_size or stream.global_batch_size
        assert 0 <= rank < size, f"rank {rank} is not one of {size}"
        if total % (size * micro_batch_size):
            raise ValueError(
                f"train.global_batch_size ({total}) must be divisible by data-parallel ranks ({size}) x "
                f"train.micro_batch_size ({micro_batch_size}) = {size * micro_batch_size}."
            )
        self.micro_batch_size, self.number, self.start = micro_batch_size, start_batch, start_batch
        self.position_ids = torch.arange(stream.length - 1).repeat(micro_batch_size, 1)
        self.part = _Slice(stream, total, rank * (total // size), total // size)
        self.closed, self.workers = False, []
        by_sample = stream.config.data.attention == "sample"
        self.slot = None if workers else _Slot(self.part.blocks, stream.length, by_sample)
        stream.prepare(self.part.first_block(start_batch))  # before forking, so that workers share its tables
        self._end = weakref.finalize(self, _end_workers, self.workers)
        _open_workers.append(self.workers)
        for offset in range(workers):
            slots = [_Slot(self.part.blocks, stream.length, by_sample) for _ in range(prefetch)]
            self.workers.append(_Worker(self.part, start_batch + offset, workers, slots))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[int, list[MicroBatch]]:
        if self.closed:
            raise StopIteration
        number = self.number
        try:
            if self.slot:
                self._fill_here(number)
                micro_batches = self._split(self.slot)
            else:
                worker = self.workers[(number - self.start) % len(self.workers)]
                micro_batches = self._split(worker.receive(number))
                worker.release()
        except BaseException:
            self.close()
            raise
        self.number += 1
        return number, micro_batches

    def _fill_here(self, number: int) -> None:
        try:
            self.part.fill(number, self.slot)
        except ValueError as error:
            raise ValueError(f"batch {number}: {error}") from error

    def _split(self, slot: _Slot) -> list[MicroBatch]:
        """Copy a slot into micro-batches; nothing refers to the slot afterwards."""
        micro_batches = []
        for start in range(0, self.part.blocks, self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            micro_batches.append(
                MicroBatch(
                    tokens=_part(slot.tokens, rows),
                    labels=torch.from_numpy(slot.tokens[rows, 1:].astype(np.int64)),
                    loss_weights=torch.from_numpy(slot.weights[rows, 1:].copy()),
                    position_ids=self.position_ids if slot.positions is None else _part(slot.positions, rows),
                    samples=None if slot.samples is None else _part(slot.samples, rows),
                    trimmed=int(slot.trimmed[rows].sum()),
                )
            )
        return micro_batches

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        self.closed = True
        self._end()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()
