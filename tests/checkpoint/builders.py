"""Builders of small checkpoints for tests: one 6 x 4 tensor in two row halves, or a tiny model with its tokenizers."""

import threading

import torch

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import Piece, step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.stream.identity import describe_sources
from megatron_cm3leon.model.weights import trained_shapes
from megatron_cm3leon.tokenizers.folder import write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig
from megatron_cm3leon.training.base_model import open_base_model
from tests.data.corpora import make_vocabulary

FULL_TENSOR = torch.arange(24.0).view(6, 4)


def make_pieces(rank, tensor=FULL_TENSOR, kinds=("weight",)):
    """Pieces of one rank, views of `tensor`: rank 0 has one half as one piece, rank 1 the other half as two."""
    pieces = []
    for kind in kinds:
        position = {"name": "w", "kind": kind, "shape": (6, 4), "part": (3, 4), "offset": (3 * rank, 0)}
        half = tensor[3 * rank : 3 * rank + 3].reshape(-1)
        for start, stop in ((0, 12),) if rank == 0 else ((0, 5), (5, 12)) if rank == 1 else ():
            pieces.append((Piece(**position, start=start, stop=stop), half[start:stop]))
    return pieces


def write_checkpoint(run, step=3, ranks=2, kinds=("weight",), config=None):
    """Write a complete checkpoint; returns its folder."""
    folder = step_folder(run, step)
    sharded.begin_checkpoint(folder)
    for rank in range(ranks):
        sharded.write_rank_file(folder, rank, make_pieces(rank, kinds=kinds))
    state = TrainState(step=step, batch=step, tokens=1000 * step)
    sharded.finish_checkpoint(folder, config or Config(), make_vocabulary(), state, {"torch": "x"})
    return folder


def flip_byte(path, index=-1):
    """Change one bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def run_ranks(count, function):
    """Call function(rank) in one thread per rank; returns the result or the exception of each."""
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
    f"a {size} {color} circle,  in the {position} ({number})\n"
    for size in ("small", "large")
    for color in ("red", "green", "bluish-green")
    for position in ("centre", "top left corner", "bottom")
    for number in (1, 22, 2023)
]


def write_tokenizers(folder, text_size=330) -> Vocabulary:
    """Write a tokenizer folder: trained text pieces, an image tokenizer with random weights; returns its vocabulary."""
    folder.mkdir(parents=True)
    train_text(CAPTIONS, text_size).save(folder / "text.model")
    torch.manual_seed(0)
    shape = dict(image_size=8, codebook_size=16, embed_dim=4, latent_channels=8, base_channels=8, norm="pixel")
    ImageTokenizer(VQGAN(VQGANConfig(**shape, channel_multiplier=(1, 1, 1), num_res_blocks=0))).save(folder / "image")
    return write_vocabulary(folder, specials=20, sentinels=4)


def family_config(*overrides):
    """Validated configuration of a tiny model; `overrides` such as model.family=llama."""
    sizes = ["model.layers=2", "model.hidden_size=32", "model.heads=4", "data.seq_length=20"]
    config = load_config(None, [*sizes, *overrides])
    validate_config(config)
    return config


def write_random_adapter(run, config, vocabulary, step=3):
    """Write random values of all that `config` trains (lora, train.only) on the base train.init; returns the folder."""
    base = open_base_model(config, vocabulary)
    init = base.describe(base.weights.hash_content())
    return write_random_checkpoint(run, config, vocabulary, step, init=init)


def write_random_checkpoint(
    run, config, vocabulary, step=3, change=lambda name, weight: weight, stream=None, init=None
):
    """Write random weights of a model, tensors alternately in the files of two ranks; returns the folder.

    `change` may replace a weight or omit it (None); `stream`: the stream that the state names; `init`: its base.
    """
    folder = step_folder(run, step)
    sharded.begin_checkpoint(folder)
    generator, pieces = torch.Generator().manual_seed(0), ([], [])
    for number, (name, shape) in enumerate(trained_shapes(config, vocabulary.size).items()):
        weight = torch.randn(shape, generator=generator) * 0.2 + (1 if len(shape) == 1 else 0)
        weight = change(name, weight)
        if weight is not None:
            shape = tuple(weight.shape)
            piece = Piece(name, "weight", shape, (0,) * len(shape), shape, 0, weight.numel())
            pieces[number % 2].append((piece, weight.reshape(-1)))
    for rank in (0, 1):
        sharded.write_rank_file(folder, rank, pieces[rank])
    state = TrainState(step=step, batch=step, sequence=step * config.train.global_batch_size, tokens=1000 * step)
    state.init = init or {}
    if stream:
        state.stream, state.stream_parts = stream.identity, describe_sources(stream.samples, config)
    sharded.finish_checkpoint(folder, config, vocabulary, state, {"torch": "x"})
    return folder
