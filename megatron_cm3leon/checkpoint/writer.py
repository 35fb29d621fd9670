"""CheckpointWriter: writes checkpoints in a thread; training waits only for the copy to the CPU.

save()           waits for the previous save and starts a thread
thread           every rank: copies its pieces to the CPU, writes and hashes its rank file, then writes the record
                 rank 0: waits on the file system for the records of all ranks, then finishes the folder
wait_for_copy()  before the next optimizer step, because forward and backward passes do not change weights and moments
poll()           returns whether the thread of this rank is done, and raises its error

Threads use no collectives, because those of the training step run at the same time. The writer works for any engine
that provides its pieces (format.Piece), and does not depend on megatron-core or DeepSpeed.
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
from megatron_cm3leon.checkpoint.format import Piece, list_checkpoints, rank_file, temporary_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.tokenizers.vocab import Vocabulary

Pieces = Iterable[tuple[Piece, torch.Tensor]]

SECONDS_WITHOUT_GROWTH = 1800
"""Rank 0 stops waiting when no rank's file has grown for this time."""
LONGEST_PAUSE_SECONDS = 1.0
"""Longest time between two listings of the folder, which load a shared file system."""


class CheckpointWriter:
    """Writes this rank's part of each checkpoint. At most one save is in progress."""

    def __init__(self, rank: int, world_size: int, barrier: Callable[[], None], *, asynchronous: bool = True) -> None:
        """`barrier` returns once all ranks have called it.

        With `asynchronous` False, save() returns when the checkpoint is written; such a save needs no second copy of
        the weights and moments in CPU memory.
        """
        self.rank, self.world_size, self.barrier, self.asynchronous = rank, world_size, barrier, asynchronous
        self._buffer = _Buffer()
        self.reserved = not asynchronous
        """Whether memory was allocated, or none is needed."""
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
        """Start writing the checkpoint `folder`; collective.

        The tensors must not change before wait_for_copy() has returned; `state` and `config` may change at once.
        `pieces` are (position, flat tensor) of what this rank writes: all ranks together write every number once.
        Raises the error of the previous save, and ValueError when the temporary folder cannot be created.
        """
        folder = Path(folder)
        self.wait()
        if self.rank == 0:
            with _explain_os_errors(folder):
                sharded.begin_checkpoint(folder)
        self.barrier()
        finish = partial(
            sharded.finish_checkpoint, folder, copy.deepcopy(config), vocabulary, copy.deepcopy(state), versions
        )
        if not self.asynchronous:
            self._write(folder, pieces, finish)
            self.barrier()
            return
        self._copied.clear()
        arguments = folder, self._buffer.copies(list(pieces)), finish
        self._thread = Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Return once the tensors of the save in progress may change."""
        self._copied.wait()

    def reserve(self, count: int, device: torch.device) -> None:
        """Allocate memory for `count` numbers from `device` in a thread, so that the first save need not wait for it.

        Later calls have no effect. Page-locking slows down training steps: call this shortly before the save.
        """
        if not self.reserved:
            self.reserved = True
            self._buffer.reserve(count, device)

    def poll(self) -> bool:
        """Whether no save is in progress on this rank (rank 0: the checkpoint is complete); raises its error."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Return once the save is done; raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the save in progress, whose error it raises, and free the memory."""
        try:
            self.wait()
        finally:
            self._buffer.release()

    def _run(self, folder: Path, copy_pieces: Callable[[], Pieces], finish: Callable[[], None]) -> None:
        try:
            pieces = copy_pieces()
            self._copied.set()
            self._write(folder, pieces, finish)
        except BaseException as error:  # wait() and poll() raise it in the training loop
            self._error = error
        finally:
            self._copied.set()

    def _write(self, folder: Path, pieces: Pieces, finish: Callable[[], None]) -> None:
        with _explain_os_errors(folder):
            try:
                sharded.write_rank_file(folder, self.rank, pieces)
            except BaseException as error:
                self._report_failure(folder, error)
                raise
            if self.rank == 0:
                self._wait_for_records(folder)
                finish()

    def _report_failure(self, folder: Path, error: BaseException) -> None:
        """Delete the rank file and report the error to rank 0 in a file, as far as the disk permits."""
        path = temporary_folder(folder) / rank_file(self.rank)
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            path.with_suffix(".failed").write_text(str(error))

    def _wait_for_records(self, folder: Path) -> None:
        """Return when the records of all ranks exist; ValueError when a rank failed or no file grows any more."""
        pause, size, since = 0.002, -1, time.monotonic()
        records = {rank_file(rank).replace(".safetensors", ".json"): rank for rank in range(self.world_size)}
        while True:
            with os.scandir(temporary_folder(folder)) as entries:
                found = {entry.name: entry for entry in entries}
            missing = [rank for name, rank in records.items() if name not in found]
            if not missing:
                return
            for name, entry in found.items():
                if name.endswith(".failed"):
                    raise ValueError(
                        f"checkpoint {folder} was not written: {name.removesuffix('.failed')} failed with "
                        f"{Path(entry.path).read_text()}"
                    )
            new_size = sum(_get_size(entry) for entry in found.values())
            if new_size != size:
                size, since = new_size, time.monotonic()
            elif time.monotonic() - since > SECONDS_WITHOUT_GROWTH:
                raise ValueError(
                    f"checkpoint {folder} was not written: rank {missing[0]} ({len(missing)} ranks in total) wrote "
                    f"nothing for {SECONDS_WITHOUT_GROWTH} s; check that these ranks are running and see the same file "
                    f"system."
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _get_size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # renamed since the listing
        return 0


@contextmanager
def _explain_os_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError of the body into a ValueError with the path, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        path = error.filename or temporary_folder(folder)
        previous = list_checkpoints(folder.parent.parent)
        resume = f"the run resumes from {previous[-1]}" if previous else "the run has no checkpoint yet"
        raise ValueError(
            f"checkpoint {folder} was not written: {path}: {error.strerror or error}; free disk space or fix the path, "
            f"or choose another with output=..., and start the same command again ({resume})."
        ) from error


class _Buffer:
    """CPU memory for the fp32 numbers of one rank, kept between saves; page-locked when they come from a GPU."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)
        self._locked = False
        self._preparation: Thread | None = None

    def reserve(self, count: int, device: torch.device) -> None:
        """Start allocating in a thread: new memory, whose pages are cleared and locked, costs more than the copy."""

        def prepare() -> None:
            with suppress(MemoryError, RuntimeError):  # the save itself allocates again and reports the error
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # a thread starts on device 0
                self._allocate(count, device.type == "cuda")
                self._numbers.zero_()

        self._preparation = Thread(target=prepare, name="checkpoint memory", daemon=True)
        self._preparation.start()

    def copies(self, pieces: list[tuple[Piece, torch.Tensor]]) -> Callable[[], Pieces]:
        """Return a function that copies the pieces' tensors; the copies of the previous save are overwritten.

        Another thread may call it: on a GPU the tensors are copied as they are now, in parallel to later kernels.
        """
        device = next((tensor.device for _, tensor in pieces if tensor.is_cuda), None)
        if device is None:
            return partial(self._copy, pieces, locked=False)
        now = torch.cuda.current_stream(device).record_event()

        def copy_pieces() -> Pieces:
            torch.cuda.set_device(device)  # a thread starts on device 0
            stream = torch.cuda.Stream(device)
            stream.wait_event(now)
            with torch.cuda.stream(stream):
                copied = self._copy(pieces, locked=True)
            stream.synchronize()
            return copied

        return copy_pieces

    def _copy(self, pieces: list[tuple[Piece, torch.Tensor]], locked: bool) -> Pieces:
        self._join()
        self._allocate(sum(tensor.numel() for _, tensor in pieces), locked)
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

    def _allocate(self, count: int, locked: bool) -> None:
        """Allocate memory for `count` numbers unless the buffer is large enough."""
        if count <= self._numbers.numel() and locked == self._locked:
            return
        self._free()
        self._numbers = torch.empty(count)
        if locked and count:
            # torch rounds its page-locked memory up to a power of two: up to twice as much as needed.
            size = count * self._numbers.element_size()  # flag 1: for every device of this process
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._numbers.data_ptr(), size, 1))
            self._locked = True

    def release(self) -> None:
        """Free the memory; no copy may be in progress."""
        self._join()
        self._free()

    def _free(self) -> None:
        if self._locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._numbers.data_ptr()))
        self._numbers, self._locked = torch.empty(0), False
