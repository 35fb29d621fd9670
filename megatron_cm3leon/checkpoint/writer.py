"""CheckpointWriter: a checkpoint is copied and written while training goes on, which waits for the copy alone.

save()           waits for the save before it and starts a thread
thread           every rank: copies its pieces to the CPU, writes its rank file and hashes it, then its record
                 rank 0: waits on the file system until every rank's record is there, then finishes the folder
wait_for_copy()  before the optimizer's next step: forward and backward passes leave weights and moments alone
poll()           tells whether this rank's thread is done, and raises what went wrong in it

Threads use no collective: those of the training step are under way at the same time. Any engine that can name its
pieces (folder.Piece) can use it; it knows nothing of megatron-core or DeepSpeed.
"""

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread

import torch

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import Piece, list_checkpoints, rank_file, unfinished
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.tokenizers.vocab import Vocabulary

Pieces = Iterable[tuple[Piece, torch.Tensor]]

SECONDS_WITHOUT_GROWTH = 1800
"""Rank 0 gives up when no rank's file has grown for so long."""
LONGEST_PAUSE_SECONDS = 1.0
"""Between two looks at the folder, which a shared file system pays for."""


class CheckpointWriter:
    """Writes this rank's part of one checkpoint after another. At most one save is under way."""

    def __init__(self, rank: int, world_size: int, barrier: Callable[[], None], *, asynchronous: bool = True) -> None:
        """`barrier` returns once every rank called it; with `asynchronous` False, save() returns when all is written.

        A synchronous save needs no second copy of the weights and moments in CPU memory.
        """
        self.rank, self.world_size, self.barrier, self.asynchronous = rank, world_size, barrier, asynchronous
        self._buffer = _Buffer()
        self.reserved = not asynchronous
        """Whether memory was made ready, or none is needed."""
        self._thread: Thread | None = None
        self._copied = Event()
        self._copied.set()
        self._error: BaseException | None = None

    def save(
        self,
        folder: str | Path,
        pieces: Pieces,
        config: Config,
        vocabulary: Vocabulary,
        state: TrainState,
        versions: dict[str, str],
    ) -> None:
        """Start writing the checkpoint `folder`; every rank calls it.

        The tensors must not change before wait_for_copy() has returned; state and config may at once. `pieces` are
        (place, flat tensor) of what this rank writes: all ranks together every number once. Raises what went wrong in
        the save before, and ValueError when the temporary folder cannot be made.
        """
        folder = Path(folder)
        self.wait()
        if self.rank == 0:
            with _explained(folder):
                sharded.begin(folder)
        self.barrier()
        finish = partial(sharded.finish, folder, copy.deepcopy(config), vocabulary, copy.deepcopy(state), versions)
        if not self.asynchronous:
            self._write(folder, pieces, finish)
            self.barrier()
            return
        self._copied.clear()
        arguments = folder, self._buffer.copies(list(pieces)), finish
        self._thread = Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Return once the tensors of the save under way may change."""
        self._copied.wait()

    def reserve(self, count: int, device: torch.device) -> None:
        """Prepare memory for `count` numbers from `device` beside training, so that the first save finds it ready.

        Does so once. Page-locking slows down the steps beside it: call this soon before that save.
        """
        if not self.reserved:
            self.reserved = True
            self._buffer.reserve(count, device)

    def poll(self) -> bool:
        """Whether no save is under way on this rank (rank 0: the checkpoint is whole); raises what went wrong in it."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Return once the save is done; raises what went wrong in it, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """wait(), and give the memory back."""
        try:
            self.wait()
        finally:
            self._buffer.release()

    def _run(self, folder: Path, copy_pieces: Callable[[], Pieces], finish: Callable[[], None]) -> None:
        try:
            pieces = copy_pieces()
            self._copied.set()
            self._write(folder, pieces, finish)
        except BaseException as error:  # whatever it is, the training loop has to hear of it
            self._error = error
        finally:
            self._copied.set()

    def _write(self, folder: Path, pieces: Pieces, finish: Callable[[], None]) -> None:
        with _explained(folder):
            try:
                sharded.write_rank(folder, self.rank, pieces)
            except BaseException as error:
                self._give_up(folder, error)
                raise
            if self.rank == 0:
                self._wait_for_records(folder)
                finish()

    def _give_up(self, folder: Path, error: BaseException) -> None:
        """Make room, and tell rank 0 not to wait, as far as the disk still can."""
        path = unfinished(folder) / rank_file(self.rank)
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            path.with_suffix(".failed").write_text(str(error))

    def _wait_for_records(self, folder: Path) -> None:
        """Return when every rank's record is there; ValueError when one failed or nothing grows any more."""
        pause, size, since = 0.002, -1, time.monotonic()
        wanted = {rank_file(rank).replace(".safetensors", ".json"): rank for rank in range(self.world_size)}
        while True:
            with os.scandir(unfinished(folder)) as entries:
                found = {entry.name: entry for entry in entries}
            missing = [rank for name, rank in wanted.items() if name not in found]
            if not missing:
                return
            for name, entry in found.items():
                if name.endswith(".failed"):
                    raise ValueError(
                        f"checkpoint {folder} was not written: {name.removesuffix('.failed')} met "
                        f"{Path(entry.path).read_text()}"
                    )
            grown = sum(_size(entry) for entry in found.values())
            if grown != size:
                size, since = grown, time.monotonic()
            elif time.monotonic() - since > SECONDS_WITHOUT_GROWTH:
                raise ValueError(
                    f"checkpoint {folder} was not written: nothing of rank {missing[0]} ({len(missing)} ranks in "
                    f"all) has come for {SECONDS_WITHOUT_GROWTH} s; see whether those ranks are alive and reach "
                    f"the same file system."
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # renamed since the listing
        return 0


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """An error of the file system becomes a sentence with the path, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        path = error.filename or unfinished(folder)
        before = list_checkpoints(folder.parent.parent)
        resume = f"the run resumes from {before[-1]}" if before else "the run has no checkpoint yet"
        raise ValueError(
            f"checkpoint {folder} was not written: {path}: {error.strerror or error}; make room or mend the path, or "
            f"choose another with output=..., and start the same command again ({resume})."
        ) from error


class _Buffer:
    """CPU memory for one rank's numbers, fp32, kept between saves; page-locked when they come from a GPU."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)
        self._locked = False
        self._preparation: Thread | None = None

    def reserve(self, count: int, device: torch.device) -> None:
        """Start making room: new memory costs more than the copy (its pages are cleared, and locked)."""

        def prepare() -> None:
            with suppress(MemoryError, RuntimeError):  # the save itself will tell
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # a thread begins on device 0
                self._make(count, device.type == "cuda")
                self._numbers.zero_()

        self._preparation = Thread(target=prepare, name="checkpoint memory", daemon=True)
        self._preparation.start()

    def copies(self, pieces: list[tuple[Piece, torch.Tensor]]) -> Callable[[], Pieces]:
        """A function that gives the same pieces with copies of their tensors; the copies before them are overwritten.

        Another thread may call it: on a GPU the tensors are copied as they are now, beside the kernels that follow.
        """
        device = next((tensor.device for _, tensor in pieces if tensor.is_cuda), None)
        now = torch.cuda.current_stream(device).record_event() if device else None

        def copy_pieces() -> Pieces:
            self._join()
            if device is None:
                return self._copy(pieces, locked=False)
            torch.cuda.set_device(device)  # a thread begins on device 0
            stream = torch.cuda.Stream(device)
            stream.wait_event(now)
            with torch.cuda.stream(stream):
                copied = self._copy(pieces, locked=True)
            stream.synchronize()
            return copied

        return copy_pieces

    def _copy(self, pieces: list[tuple[Piece, torch.Tensor]], locked: bool) -> Pieces:
        self._make(sum(tensor.numel() for _, tensor in pieces), locked)
        copied, end = [], 0
        for piece, tensor in pieces:
            target = self._numbers[end : end + tensor.numel()]
            target.copy_(tensor.detach().reshape(-1), non_blocking=locked)
            copied.append((piece, target))
            end += tensor.numel()
        return copied

    def _join(self) -> None:
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None

    def _make(self, count: int, locked: bool) -> None:
        if count <= self._numbers.numel() and locked == self._locked:
            return
        self._free()
        self._numbers = torch.empty(count)
        if locked and count:
            # torch's own page-locked memory comes in powers of two: up to twice of what is needed.
            size = count * self._numbers.element_size()  # flag 1: for every device of this process
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._numbers.data_ptr(), size, 1))
            self._locked = True

    def release(self) -> None:
        self._join()
        self._free()

    def _free(self) -> None:
        if self._locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._numbers.data_ptr()))
        self._numbers, self._locked = torch.empty(0), False
