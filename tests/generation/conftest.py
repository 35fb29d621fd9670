"""A tiny random model in an exported folder's form, and tokenizers simple enough to compute by hand."""

from types import SimpleNamespace

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.generate import Generator
from megatron_cm3leon.tokenizers.vocab import Vocabulary

WORDS = ["a", "red", "blue", "circle", "square", "x", "on", "white", "small", "large"]

VOCABULARY = Vocabulary(
    text_size=len(WORDS),
    image_size=16,
    sentinels=4,
    specials=10,
    image_height=3,
    image_width=4,
    text_sha256="a" * 64,
    image_sha256="b" * 64,
)


class WordTokenizer:
    """One id a word."""

    size = len(WORDS)

    def encode(self, text):
        return [WORDS.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(WORDS[number] for number in ids)


class LevelTokenizer:
    """One code a pixel of a grey 3 x 4 picture: its level, 0 to 15."""

    image_size, grid, codebook_size = 4, (3, 4), 16

    def encode(self, pixels):
        levels = ((pixels[:, 0, :3] + 1) / 2 * 15).round().long()
        return levels.reshape(len(pixels), 12)

    def decode(self, codes):
        levels = codes.reshape(-1, 1, 3, 4).float() / 15 * 2 - 1
        return torch.cat([levels, levels[:, :, :1]], dim=2).expand(-1, 3, -1, -1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        do_layer_norm_before=True,
        dropout=0.0,
        init_std=0.3,
        bos_token_id=VOCABULARY.eos,
        eos_token_id=VOCABULARY.eos,
        pad_token_id=VOCABULARY.pad,
    )
    path = tmp_path_factory.mktemp("exported")
    OPTForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stock(folder):
    return OPTForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def decoder(folder):
    return Decoder.load(folder)


@pytest.fixture(scope="session")
def vocabulary():
    return VOCABULARY


@pytest.fixture(scope="session")
def generator(decoder):
    tokenizers = SimpleNamespace(text=WordTokenizer(), image=LevelTokenizer(), vocabulary=VOCABULARY)
    return Generator(decoder, tokenizers)
