"""A tiny random model with its tokenizers, as decoder and as generator."""

import pytest
from transformers import OPTForCausalLM

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.generator import Generator
from tests.data.corpora import make_vocabulary
from tests.models import make_tokenizers, save_random_opt

WORDS = ["a", "red", "blue", "circle", "square", "x", "on", "white", "small", "large"]
VOCABULARY = make_vocabulary(text=len(WORDS), image=16, height=3, width=4, sentinels=4, specials=10)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported")
    save_random_opt(path, VOCABULARY, layers=3, heads=4)
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
    return Generator(decoder, make_tokenizers(WORDS, VOCABULARY))
