"""Small checkpoints for tests: one 6x4 tensor in row halves, or a tiny model; and its tokenizer folder."""

import threading

import torch

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import Piece, step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.data.stream.identity import describe_sources
from megatron_cm3leon.model.weights import canonical_shapes
from megatron_cm3leon.tokenizers.folder import write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig
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
    folder = step_folder(run, step)
    sharded.begin_checkpoint(folder)
    for rank in range(ranks):
        sharded.write_rank_file(folder, rank, make_pieces(rank, kinds=kinds))
    state = TrainState(step=step, batch=step, tokens=1000 * step)
    sharded.finish_checkpoint(folder, config or Config(), make_vocabulary(), state, {"torch": "x"})
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


CAPTIONS = [
    f"a {size} {colour} circle,  in the {place} ({number})\n"
    for size in ("small", "large")
    for colour in ("red", "green", "bluish-green")
    for place in ("centre", "top left corner", "bottom")
    for number in (1, 22, 2023)
]


def write_tokenizers(folder, text_size=330) -> Vocabulary:
    """A tokenizer folder: trained text pieces, an image tokenizer with random weights; returns its vocabulary."""
    folder.mkdir(parents=True)
    train_text(CAPTIONS, text_size).save(folder / "text.model")
    torch.manual_seed(0)
    shape = dict(image_size=8, codebook_size=16, embed_dim=4, latent_channels=8, base_channels=8, norm="pixel")
    ImageTokenizer(VQGAN(VQGANConfig(**shape, channel_multiplier=(1, 1, 1), num_res_blocks=0))).save(folder / "image")
    return write_vocabulary(folder, specials=20, sentinels=4)


def family_config(*overrides):
    """A tiny validated model; `overrides` such as model.family=llama."""
    sizes = ["model.layers=2", "model.hidden_size=32", "model.heads=4", "data.seq_length=20"]
    config = load_config(None, [*sizes, *overrides])
    config.validate()
    return config


def write_random_checkpoint(run, config, vocabulary, step=3, change=lambda name, weight: weight, stream=None):
    """Random weights of a model, its tensors in turn in two ranks' files; `change` may replace or drop (None) one.

    `stream`: the one that the run is said to have trained on.
    """
    folder = step_folder(run, step)
    sharded.begin_checkpoint(folder)
    generator, pieces = torch.Generator().manual_seed(0), ([], [])
    for number, (name, shape) in enumerate(canonical_shapes(config, vocabulary.size).items()):
        weight = torch.randn(shape, generator=generator) * 0.2 + (1 if len(shape) == 1 else 0)
        weight = change(name, weight)
        if weight is not None:
            whole = tuple(weight.shape)
            piece = Piece(name, "weight", whole, (0,) * len(whole), whole, 0, weight.numel())
            pieces[number % 2].append((piece, weight.reshape(-1)))
    for rank in (0, 1):
        sharded.write_rank_file(folder, rank, pieces[rank])
    state = TrainState(step=step, batch=step, sequence=step * config.train.global_batch_size, tokens=1000 * step)
    if stream:
        state.stream, state.stream_parts = stream.identity, describe_sources(stream.samples, config)
    sharded.finish_checkpoint(folder, config, vocabulary, state, {"torch": "x"})
    return folder
