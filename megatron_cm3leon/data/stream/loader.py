"""Loader: the batches of a stream for one data-parallel rank, prepared ahead in worker processes.

    for b, micro_batches in Loader(stream, rank=0, size=2, micro_batch_size=4, workers=2):

Batch b + 1 is the G sequences after those of batch b; `start_sequence` is the first of `start_batch`. Rank r of `size`
gets G / size of them in order, from the (r * G / size)-th on. Worker w of W prepares batches start + w, start + w + W
...: the order is fixed, and no batch depends on the state of a worker.

Workers are forked and return batches in anonymous shared memory (a ring of `prefetch` slots per worker), which has no
name to clean up and does not count against /dev/shm. A worker that dies is detected at its next batch. Workers end with
`close()`, with the interpreter, or within seconds after the training process dies. They ignore SIGTERM and SIGUSR1, so
that the last steps can be finished when the scheduler signals the whole job.
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
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import numpy as np
import torch

from megatron_cm3leon.data.stream.stream import SequenceBatch, SequencePlan, Stream

_PARENT_CHECK_SECONDS = 1.0
_SEQUENCES_AT_ONCE = 64


@dataclass
class MicroBatch:
    """Sequences of one forward pass; token t + 1 of a sequence is the label of token t."""

    tokens: torch.Tensor
    """int64 [micro_batch_size, seq_length]."""
    labels: torch.Tensor
    """int64 [micro_batch_size, seq_length]."""
    loss_weights: torch.Tensor
    """Weight of each label's loss, float32 [micro_batch_size, seq_length]."""
    position_ids: torch.Tensor
    """0, 1, 2 ... in each row (data.attention=sample: in each sample), int64 [micro_batch_size, seq_length]."""
    samples: torch.Tensor | None
    """Under data.attention=sample: the sample of each token, int64 [micro_batch_size, seq_length]."""
    trimmed: int
    """Tokens cut from these sequences because masking adds tokens, or by the packing."""


@dataclass(frozen=True)
class _Slice:
    """The sequences of each batch that one rank gets."""

    stream: Stream
    global_batch_size: int
    start_batch: int
    start_sequence: int
    """First sequence of batch `start_batch`."""
    first: int
    """The rank's first sequence within a batch."""
    sequences: int
    """Sequences per batch and rank."""

    def numbers(self, batch: int) -> np.ndarray:
        """Numbers of this rank's sequences of a batch, int64."""
        start = self.start_sequence + (batch - self.start_batch) * self.global_batch_size + self.first
        return np.arange(start, start + self.sequences)


class _Filler:
    """Fills batches start, start + step ..., several at a time: many sequences share the overhead of a numpy call.

    It plans one group of batches ahead and prefetches their documents, which are read while the group before is filled.
    """

    def __init__(self, part: _Slice, start: int, step: int) -> None:
        self.part, self.step = part, step
        self.batches_per_fill = max(1, _SEQUENCES_AT_ONCE // part.sequences)
        self.batch, self.planned = start, start
        self.plans: deque[tuple[int, SequencePlan]] = deque()
        self.ready: SequenceBatch | None = None
        self.row = 0

    def __next__(self) -> SequenceBatch:
        """The next batch."""
        if self.ready is None or self.row == len(self.ready.tokens):
            self.ready, self.row = self._fill(), 0
        rows = slice(self.row, self.row + self.part.sequences)
        self.row = rows.stop
        self.batch += self.step
        return self.ready.rows(rows)

    def _fill(self) -> SequenceBatch:
        while len(self.plans) < 2:
            self._plan()
        batches, plan = self.plans.popleft()
        try:
            return self.part.stream.fill(plan)
        except (ValueError, OSError):
            if batches == 1:
                raise
            self.batches_per_fill, self.planned = 1, self.batch  # retry one by one, to report the batch that fails
            self.plans.clear()
            return self._fill()

    def _plan(self) -> None:
        batches = range(self.planned, self.planned + self.batches_per_fill * self.step, self.step)
        plan = self.part.stream.plan(np.concatenate([self.part.numbers(batch) for batch in batches]))
        self.part.stream.prefetch(plan)
        self.plans.append((len(batches), plan))
        self.planned += self.batches_per_fill * self.step


class _Slot:
    """Memory of one batch, shared between a worker and the training process."""

    def __init__(self, rows: int, length: int, dtype: np.dtype, by_sample: bool) -> None:
        size = rows * length
        kinds: list[np.dtype] = [
            np.dtype(np.int64),
            np.dtype(np.float32),
            *[np.dtype(np.int32)] * (2 * by_sample),
            dtype,
        ]
        counts = [rows, *[size] * (len(kinds) - 1)]
        parts = [count * kind.itemsize for count, kind in zip(counts, kinds, strict=True)]
        memory = mmap.mmap(-1, sum(parts))  # anonymous, shared with forked children
        starts = itertools.accumulate(parts, initial=0)
        arrays = [
            np.frombuffer(memory, kind, count, start) for kind, count, start in zip(kinds, counts, starts, strict=False)
        ]
        self.trimmed = arrays[0]
        shaped = [array.reshape(rows, length) for array in arrays[1:]]
        self.weights, self.tokens = shaped[0], shaped[-1]
        self.samples: np.ndarray | None
        self.positions: np.ndarray | None
        self.samples, self.positions = shaped[1:3] if by_sample else (None, None)

    def store(self, batch: SequenceBatch) -> None:
        """Copy a batch into this memory."""
        self.tokens[:], self.weights[:], self.trimmed[:] = batch.tokens, batch.weights, batch.trimmed
        if self.samples is not None and self.positions is not None:
            self.samples[:], self.positions[:] = batch.samples, batch.positions


class _Worker:
    """A process that fills the slots of its ring in turn."""

    def __init__(self, part: _Slice, start: int, step: int, slots: list[_Slot]) -> None:
        context = multiprocessing.get_context("fork")
        self.slots = itertools.cycle(slots)
        self.connection, worker_end = context.Pipe()
        arguments = (part, start, step, slots, worker_end, os.getpid())
        self.process = context.Process(target=_fill_slots, args=arguments, daemon=True, name="loader")
        self.process.start()
        worker_end.close()  # so that this end is closed when the worker dies

    def receive(self, batch: int) -> tuple[_Slot, dict]:
        """Wait for the next batch and its cursor.

        Raises ValueError or OSError for errors of the data, RuntimeError if the worker died.
        """
        wait([self.connection, self.process.sentinel])
        try:
            message = self.connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(_explain_death(self.process, batch)) from None
        answer = json.loads(message)
        if "cursor" in answer:
            return next(self.slots), answer["cursor"]
        kinds = {"ValueError": ValueError, "OSError": OSError}
        raise kinds.get(answer["kind"], RuntimeError)(f"batch {batch}: {answer['message']}")

    def release(self) -> None:
        """Return the slot of the last batch to the worker; if the worker died, the next `receive` reports it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(b"")


def _explain_death(process: ForkProcess, batch: int) -> str:
    process.join(5)
    code = process.exitcode
    cause = f"exit status {code}"
    if code is not None and code < 0:
        cause = f"killed by signal {-code}, {signal.Signals(-code).name}"
    return (
        f"the loader worker (process {process.pid}) that was preparing batch {batch} died: {cause}. SIGKILL usually "
        f"means that the machine ran out of memory (lower data.workers or data.prefetch), SIGBUS that a shard was "
        f"truncated or its disk failed. Then start the run again: it resumes from its last checkpoint."
    )


def _fill_slots(part: _Slice, start: int, step: int, slots: list[_Slot], connection: Connection, parent: int) -> None:
    """Body of a worker process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        filler = _Filler(part, start, step)
        for turn, slot in enumerate(itertools.cycle(slots)):
            if turn >= len(slots):
                while not connection.poll(_PARENT_CHECK_SECONDS):
                    if os.getppid() != parent:
                        return
                connection.recv_bytes()
            first = part.numbers(filler.batch)[0]
            slot.store(next(filler))
            connection.send_bytes(json.dumps({"cursor": part.stream.cursor(int(first))}).encode())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the training process has ended
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
        worker.process.kill()  # it has no state that could be lost
    for worker in workers:
        worker.process.join()
        worker.connection.close()
    workers.clear()
    _open_workers[:] = [others for others in _open_workers if others is not workers]


class Loader:
    """Iterates over (b, [MicroBatch, ...]) from `start_batch` on, without end."""

    def __init__(
        self, stream: Stream, *, rank: int = 0, size: int = 1, micro_batch_size: int = 1,
        global_batch_size: int | None = None, start_batch: int = 0, start_sequence: int | None = None,
        workers: int = 0, prefetch: int = 4, pin_memory: bool = False,
    ) -> None:  # fmt: skip
        """`rank` of `size` data-parallel ranks; each worker prepares up to `prefetch` batches ahead.

        `start_sequence`: the first sequence of `start_batch`; None if all earlier batches have `global_batch_size`
        sequences. `pin_memory` returns page-locked tensors, which can be copied to a GPU while it computes. Raises
        ValueError if the global batch size is not divisible by ranks x micro-batch size.
        """
        total = global_batch_size or stream.global_batch_size
        assert 0 <= rank < size, f"rank {rank} is not one of {size}"
        if total % (size * micro_batch_size):
            raise ValueError(
                f"train.global_batch_size ({total}) must be divisible by data-parallel ranks ({size}) x "
                f"train.micro_batch_size ({micro_batch_size}) = {size * micro_batch_size}."
            )
        self.micro_batch_size, self.number, self.start = micro_batch_size, start_batch, start_batch
        self.position_ids = torch.arange(stream.length - 1).repeat(micro_batch_size, 1)
        if start_sequence is None:
            start_sequence = start_batch * total
        self.part = _Slice(stream, total, start_batch, start_sequence, rank * (total // size), total // size)
        self.closed = False
        self.workers: list[_Worker] = []
        self.cursor: dict = {}
        """Start of the last batch, for a checkpoint (Stream.resume)."""
        self.pin_memory = pin_memory
        by_sample = stream.config.data.attention == "sample"
        stream.cursor(
            int(self.part.numbers(start_batch)[0])
        )  # before forking, so that the workers inherit the position
        self.filler = None if workers else _Filler(self.part, start_batch, 1)
        self._end = weakref.finalize(self, _end_workers, self.workers)
        _open_workers.append(self.workers)
        for offset in range(workers):
            shape = (self.part.sequences, stream.length, stream.vocabulary.dtype, by_sample)
            slots = [_Slot(*shape) for _ in range(prefetch)]
            self.workers.append(_Worker(self.part, start_batch + offset, workers, slots))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[int, list[MicroBatch]]:
        if self.closed:
            raise StopIteration
        number = self.number
        try:
            if self.filler:
                micro_batches = self._split(self._fill_in_process(self.filler, number))
            else:
                worker = self.workers[(number - self.start) % len(self.workers)]
                slot, self.cursor = worker.receive(number)
                micro_batches = self._split(slot)
                worker.release()
        except BaseException:
            self.close()
            raise
        self.number += 1
        return number, micro_batches

    def _fill_in_process(self, filler: _Filler, number: int) -> SequenceBatch:
        try:
            batch = next(filler)
        except ValueError as error:
            raise ValueError(f"batch {number}: {error}") from error
        self.cursor = self.part.stream.cursor(int(self.part.numbers(number)[0]))
        return batch

    def _split(self, batch: "_Slot | SequenceBatch") -> list[MicroBatch]:
        """Copy a batch into micro-batches, which do not refer to a slot's memory."""
        micro_batches = []
        samples, positions = batch.samples, batch.positions if batch.samples is not None else None
        for start in range(0, self.part.sequences, self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            weights = batch.weights[rows, 1:]
            tensors = {
                "tokens": torch.from_numpy(batch.tokens[rows, :-1].astype(np.int64)),
                "labels": torch.from_numpy(batch.tokens[rows, 1:].astype(np.int64)),
                "loss_weights": torch.from_numpy(weights.copy() if self.workers else weights),
            }
            if samples is not None and positions is not None:
                tensors["position_ids"] = torch.from_numpy(positions[rows, :-1].astype(np.int64))
                tensors["samples"] = torch.from_numpy(samples[rows, :-1].astype(np.int64))
            if self.pin_memory:
                tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            micro_batches.append(
                MicroBatch(
                    tokens=tensors["tokens"],
                    labels=tensors["labels"],
                    loss_weights=tensors["loss_weights"],
                    position_ids=tensors.get("position_ids", self.position_ids),
                    samples=tensors.get("samples"),
                    trimmed=int(batch.trimmed[rows].sum()),
                )
            )
        return micro_batches

    def close(self) -> None:
        """Stop the workers; a second call does nothing."""
        self.closed = True
        self._end()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()
