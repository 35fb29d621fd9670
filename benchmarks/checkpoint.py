"""Saving and loading a checkpoint: the stall of an asynchronous save, and rates compared with plain torch.save.

    python benchmarks/checkpoint.py --megabytes 200
    torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint.py

The data are weights and Adam's two moments in fp32, three times --megabytes; every rank writes its share. A round times
each contender once, in an order that changes from round to round, with new files on the same idle disk. All saves wait
until the bytes are on the disk (fsync); all loads find the files in the page cache. Our saves and loads compute a
SHA-256 of every byte, those of torch do not. The stall is the time for which an asynchronous save stops training: the
call itself, plus the wait for the rest of the copy after the next forward and backward pass (here: matrix products of
--pass-seconds). That pass is timed, too, because hashing and writing share the CPU's cores with it. Ratios are those of
the fastest rounds, and medians of the pairs within a round.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cm3leon.checkpoint.format import KINDS, Piece, hash_file, step_folder
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.checkpoint.verify import verify_while_reading
from megatron_cm3leon.checkpoint.writer import CheckpointWriter
from megatron_cm3leon.common.cli import run_tool
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.distributed.launch import Rank, gather_objects, set_threads
from megatron_cm3leon.tokenizers.vocab import Vocabulary

STALL = "stall of an asynchronous save"
WAIT = "stall without a pass (the copy)"
PASS = "forward and backward pass"
BESIDE = "... beside an asynchronous save"
COLUMNS = 1024
ROWS = 4096
"""Rows of a tensor of 16 MiB, the size of a 760m model's largest tensors."""


def make_tensors(megabytes: float, rank: Rank) -> dict[str, torch.Tensor]:
    """This rank's rows of every tensor, by `kind/name` as in a checkpoint."""
    count = max(1, round(megabytes * 1e6 / (4 * ROWS * COLUMNS)))
    rows = ROWS // rank.world_size
    generator = torch.Generator().manual_seed(rank.rank)
    return {
        f"{kind}/layer{number}": torch.randn(rows, COLUMNS, generator=generator)
        for number in range(count)
        for kind in KINDS
    }


def make_pieces(tensors: dict[str, torch.Tensor], rank: Rank) -> list[tuple[Piece, torch.Tensor]]:
    pieces = []
    for key, tensor in tensors.items():
        kind, name = key.split("/")
        shape, offset = (ROWS // rank.world_size * rank.world_size, COLUMNS), (rank.rank * len(tensor), 0)
        pieces.append((Piece(name, kind, shape, offset, tuple(tensor.shape), 0, tensor.numel()), tensor.view(-1)))
    return pieces


def synced_torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


class Contenders:
    """The operations that are timed; all ranks call each method together."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], rank: Rank, pass_seconds: float) -> None:
        self.folder, self.tensors, self.rank = folder, tensors, rank
        self.pieces = make_pieces(tensors, rank)
        self.writers = {
            asynchronous: CheckpointWriter(rank.rank, rank.world_size, dist.barrier, asynchronous=asynchronous)
            for asynchronous in (True, False)
        }
        self.vocabulary = Vocabulary(
            text_size=64, image_size=8, sentinels=4, specials=8, image_height=2, image_width=2,
            text_sha256="", image_sha256="",
        )  # fmt: skip
        self.writers[True].reserve(sum(tensor.numel() for tensor in tensors.values()), torch.device("cpu"))
        self.config = Config()
        validate_config(self.config)
        self.matrix, self.product = torch.randn(1024, 1024), torch.empty(1024, 1024)
        self.products = 20
        self.compute()
        start = time.perf_counter()
        self.compute()
        self.products = max(1, round(self.products * pass_seconds / (time.perf_counter() - start)))
        [self.products, *_] = gather_objects(self.products)

    def save(self, asynchronous: bool) -> None:
        """Save; returns when all is written, or as soon as an asynchronous save has started."""
        folder = step_folder(self.folder / str(asynchronous), 1)
        writer = self.writers[asynchronous]
        writer.save(folder, self.pieces, self.config, self.vocabulary, TrainState(step=1), {})

    def compute(self) -> None:
        """Simulate a forward and backward pass, which takes --pass-seconds on idle cores."""
        for _ in range(self.products):
            torch.mm(self.matrix, self.matrix, out=self.product)

    def save_and_continue(self, compute: bool) -> None:
        """Save asynchronously; returns when the optimizer may step and sets `stall_seconds`."""
        start = time.perf_counter()
        self.save(True)
        self.stall_seconds = time.perf_counter() - start
        if compute:
            self.compute()
        start = time.perf_counter()
        self.writers[True].wait_for_copy()
        self.stall_seconds += time.perf_counter() - start

    def clean(self) -> None:
        """Delete all files that were written."""
        if self.rank.rank == 0:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def wait(self) -> None:
        """Wait until the asynchronous checkpoint is on the disk."""
        self.writers[True].wait()

    def load(self, check: bool) -> None:
        """Read what this rank wrote; verify the checksums if `check`."""
        reader = CheckpointReader(step_folder(self.folder / "False", 1))
        if not check:
            reader.find_damage = lambda name: ""
        parts = [(piece.name, piece.offset, piece.part) for piece, _ in self.pieces if piece.kind == "weight"]
        with verify_while_reading(reader, reader.list_files(parts), gather_objects):
            loaded = {
                f"{kind}/{name}": reader.read_part(name, kind, offset, size)
                for name, offset, size in parts
                for kind in KINDS
            }
        assert torch.equal(loaded["weight/layer0"], self.tensors["weight/layer0"])

    def torch_save(self) -> None:
        synced_torch_save(self.tensors, self.folder / f"{self.rank.rank}.pt")

    def torch_load(self, check: bool) -> None:
        if check:
            hash_file(self.folder / f"{self.rank.rank}.pt")
        loaded = torch.load(self.folder / f"{self.rank.rank}.pt", weights_only=True)
        assert torch.equal(loaded["weight/layer0"], self.tensors["weight/layer0"])


def timed(function: Callable[[], None]) -> float:
    """Seconds that a call takes on all ranks, from a barrier to a barrier, starting with an idle disk."""
    os.sync()  # the deletions of the previous call are also written to the disk
    dist.barrier()
    start = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - start


def measure(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the first round, which allocates memory, is the first entry."""
    seconds: dict[str, list[float]] = {}
    savers = {
        "torch.save, fsync": contenders.torch_save,
        "synchronous save": lambda: contenders.save(False),
        PASS: contenders.compute,
        BESIDE: lambda: contenders.save_and_continue(compute=True),
        WAIT: lambda: contenders.save_and_continue(compute=False),
    }
    loaders = {
        "load, SHA-256 compared": lambda: contenders.load(True),
        "load without that": lambda: contenders.load(False),
        "torch.load": lambda: contenders.torch_load(False),
        "SHA-256 of its file, torch.load": lambda: contenders.torch_load(True),
    }
    for number in range(rounds + 1):
        contenders.clean()
        for group in (savers, loaders):
            names = list(group)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds.setdefault(name, []).append(timed(group[name]))
                if name == BESIDE:
                    seconds.setdefault(STALL, []).append(max(gather_objects(contenders.stall_seconds)))
                if name in (BESIDE, WAIT):
                    start = time.perf_counter()
                    contenders.wait()
                    dist.barrier()
                    until_written = seconds[name][-1] + time.perf_counter() - start
                    if name == WAIT:
                        seconds.setdefault("... until it is on the disk", []).append(until_written)
    return seconds


def print_table(seconds: dict[str, list[float]], size: float) -> None:
    print(f"{'':32}{'first, s':>10}{'fastest, s':>12}{'median, s':>11}{'GB/s, median':>14}")
    for name, times in seconds.items():
        later = times[1:]
        middle = statistics.median(later)
        print(f"{name:32}{times[0]:10.3f}{min(later):12.3f}{middle:11.3f}{size / middle / 1e9:14.2f}")

    def ratio(one: str, other: str) -> str:
        first_times, other_times = seconds[one][1:], seconds[other][1:]
        pairs = statistics.median(a / b for a, b in zip(first_times, other_times, strict=True))
        return f"{min(first_times) / min(other_times):.2f} fastest, {pairs:.2f} median of pairs"

    synchronous = "synchronous save"
    first = seconds[STALL][0] / seconds[synchronous][0]
    print(f"stall / synchronous save: {ratio(STALL, synchronous)}, first save {first:.2f}; the target is at most 0.1")
    print(f"stall without a pass / synchronous save: {ratio(WAIT, synchronous)}")
    print(f"save rate / torch.save's: {ratio('torch.save, fsync', synchronous)}")
    checked, unchecked = "load, SHA-256 compared", "load without that"
    print(f"load rate / torch.load's: {ratio('torch.load', checked)}")
    print(f"  both with SHA-256:      {ratio('SHA-256 of its file, torch.load', checked)}")
    print(f"  both without:           {ratio('torch.load', unchecked)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200, help="fp32 weights of all ranks (default: 200)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds after the first one, which is reported separately (default: 5)"
    )
    parser.add_argument(
        "--pass-seconds", type=float, default=1, help="duration of the simulated forward and backward pass (default: 1)"
    )
    parser.add_argument("--folder", type=Path, help="folder to write the temporary files in (default: the system's)")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads per rank; 0 divides the cores among the ranks (default: 0)"
    )
    options = parser.parse_args()
    rank = Rank.from_environment()
    set_threads(options.threads, rank)
    store = dist.HashStore() if rank.world_size == 1 else None
    dist.init_process_group("gloo", rank=rank.rank, world_size=rank.world_size, store=store)
    [folder, *_] = gather_objects(tempfile.mkdtemp(dir=options.folder) if rank.rank == 0 else None)
    try:
        tensors = make_tensors(options.megabytes, rank)
        size = sum(tensor.numel() * 4 for tensor in tensors.values()) * rank.world_size
        seconds = measure(Contenders(Path(folder), tensors, rank, options.pass_seconds), options.rounds)
    finally:
        dist.destroy_process_group()
        if rank.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if rank.rank == 0:
        print(f"{size / 1e6:.0f} MB (weights and two moments, fp32), {rank.world_size} ranks, {options.rounds} rounds")
        print_table(seconds, size)


if __name__ == "__main__":
    run_tool(main)
