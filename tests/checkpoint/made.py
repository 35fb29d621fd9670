"""Small checkpoints for tests: one 6x4 tensor in row halves, with or without moments."""

import threading

import torch

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.folder import Piece
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config import Config
from tests.data.corpora import make_vocabulary

WHOLE = torch.arange(24.0).view(6, 4)


def make_pieces(rank, whole=WHOLE, kinds=("weight",)):
    """Rank 0's half whole, rank 1's in two flat runs, as views of `whole`; nothing for further ranks."""
    pieces = []
    for kind in kinds:
        place = {"name": "w", "kind": kind, "shape": (6, 4), "part": (3, 4), "offset": (3 * rank, 0)}
        half = whole[3 * rank : 3 * rank + 3].reshape(-1)
        for start, stop in ((0, 12),) if rank == 0 else ((0, 5), (5, 12)) if rank == 1 else ():
            pieces.append((Piece(**place, start=start, stop=stop), half[start:stop]))
    return pieces


def write_checkpoint(run, step=3, ranks=2, kinds=("weight",), config=None):
    """Write it whole; returns its folder."""
    folder = sharded.step_folder(run, step)
    sharded.begin(folder)
    for rank in range(ranks):
        sharded.write_rank(folder, rank, make_pieces(rank, kinds=kinds))
    state = TrainState(step=step, batch=step, tokens=1000 * step)
    sharded.finish(folder, config or Config(), make_vocabulary(), state, {"torch": "x"})
    return folder


def flip_byte(path, place=-1):
    """Change one bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def run_ranks(count, function):
    """Call function(rank) in a thread for each rank; returns what each returned or raised."""
    results = [None] * count

    def call(rank):
        try:
            results[rank] = function(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return results
