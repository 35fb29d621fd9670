"""Loader: the batches of a stream for one data-parallel rank, prepared ahead in worker processes.

    for b, micro_batches in Loader(stream, rank=0, size=2, micro_batch_size=4, ...):

Rank r of `size` gets blocks r * G / size .. (r + 1) * G / size of batch b, in order. A worker takes every
`workers`-th batch; batches come out in order whatever the workers do. Workers are forked, hold no state
that a batch depends on, and end with `close()` or when the training process ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_cm3leon.data.stream import Stream


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
    """0, 1, 2 ... in every row, int64 [micro_batch_size, seq_length]."""
    trimmed: int
    """Source tokens that masking pushed out of these blocks."""


@dataclass
class _Failure:
    """An error of a worker, as plain data: its sentence reaches the user without a foreign traceback."""

    kind: str
    message: str


class _RankBatches(Dataset):
    """Batch number -> this rank's blocks as three tensors."""

    def __init__(self, stream: Stream, rank: int, size: int, global_batch_size: int) -> None:
        self.stream, self.global_batch_size = stream, global_batch_size
        self.blocks = global_batch_size // size
        self.offset = rank * self.blocks

    def first_block(self, number: int) -> int:
        return number * self.global_batch_size + self.offset

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | _Failure:
        start = self.first_block(number)
        try:
            blocks = self.stream.blocks(start, start + self.blocks)
        except (ValueError, OSError) as error:
            return _Failure(type(error).__name__, str(error))
        tokens, weights = blocks[0].tokens.base, blocks[0].weights.base  # the rows of one array each
        if tokens is None or tokens.shape[0] != len(blocks):
            tokens, weights = np.stack([b.tokens for b in blocks]), np.stack([b.weights for b in blocks])
        trimmed = torch.tensor([block.trimmed for block in blocks])
        return torch.from_numpy(tokens), torch.from_numpy(weights), trimmed


class _From(Sampler):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1


class Loader:
    """Iterates (b, [MicroBatch, ...]) from `start_batch` on, without end."""

    def __init__(
        self, stream: Stream, *, rank: int = 0, size: int = 1, micro_batch_size: int = 1,
        global_batch_size: int | None = None, start_batch: int = 0, workers: int = 0, prefetch: int = 4,
    ) -> None:  # fmt: skip
        """`rank` of `size` data-parallel ranks; each worker prepares up to `prefetch` batches ahead."""
        global_batch_size = global_batch_size or stream.global_batch_size
        assert 0 <= rank < size, f"rank {rank} is not one of {size}"
        if global_batch_size % (size * micro_batch_size):
            raise ValueError(
                f"train.global_batch_size ({global_batch_size}) must be divisible by data-parallel ranks ({size}) x "
                f"train.micro_batch_size ({micro_batch_size}) = {size * micro_batch_size}."
            )
        self.micro_batch_size, self.number, self.workers = micro_batch_size, start_batch, workers
        dataset = _RankBatches(stream, rank, size, global_batch_size)
        stream.prepare(dataset.first_block(start_batch))
        self.position_ids = torch.arange(stream.length - 1).expand(micro_batch_size, -1).contiguous()
        options = {"multiprocessing_context": "fork", "prefetch_factor": prefetch} if workers else {}
        loader = DataLoader(dataset, batch_size=None, sampler=_From(start_batch), num_workers=workers, **options)
        self.batches = iter(loader)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[int, list[MicroBatch]]:
        if self.batches is None:
            raise StopIteration
        try:
            content = next(self.batches)
        except RuntimeError as error:
            self.close()
            raise RuntimeError(
                f"a loader worker ended while batch {self.number} was prepared: {error} A killed worker usually means "
                f"that the machine ran out of memory (or /dev/shm of space): lower data.workers or data.prefetch."
            ) from error
        if isinstance(content, _Failure):
            self.close()
            kind = {"ValueError": ValueError}.get(content.kind, OSError)
            raise kind(f"batch {self.number}: {content.message}")
        number, self.number = self.number, self.number + 1
        return number, self._split(*content)

    def _split(self, tokens: torch.Tensor, weights: torch.Tensor, trimmed: torch.Tensor) -> list[MicroBatch]:
        micro_batches = []
        for start in range(0, len(tokens), self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            micro_batches.append(
                MicroBatch(
                    tokens=tokens[rows, :-1].contiguous(),
                    labels=tokens[rows, 1:].contiguous(),
                    loss_weights=weights[rows, 1:].contiguous(),
                    position_ids=self.position_ids,
                    trimmed=int(trimmed[rows].sum()),
                )
            )
        return micro_batches

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        batches, self.batches = self.batches, None
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown:
            shutdown()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()
