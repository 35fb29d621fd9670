"""One tokenizer folder, and one checkpoint and export of each family, for all tests of conversion."""

from functools import cache
from types import SimpleNamespace

import pytest

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.export import export_checkpoint
from tests.checkpoint.builders import family_config, write_random_checkpoint, write_tokenizers
from tests.data.corpora import make_pairs, write_shards

LLAMA = ["model.family=llama", "model.kv_heads=2", "model.ffn_hidden_size=48", "model.rope_base=500.0"]
FAMILIES = {
    "opt-relu": ("OPTForCausalLM", []),
    "opt-gelu": ("OPTForCausalLM", ["model.activation=gelu", "model.ffn_hidden_size=40"]),
    "llama": ("LlamaForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", [*LLAMA, "model.qk_norm=true", "model.norm_epsilon=0.001"]),
    "qwen3-tied": ("Qwen3ForCausalLM", [*LLAMA, "model.qk_norm=true", "model.tied_embeddings=true"]),
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversion") / "tok"
    write_tokenizers(folder)
    return folder


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    from megatron_cm3leon.tokenizers.vocab import Vocabulary

    return Vocabulary.load(tokenizer)


@pytest.fixture(scope="session")
def shards(tokenizer, vocabulary):
    folder = tokenizer.parent / "shards"
    write_shards(folder, make_pairs(6, vocabulary), vocabulary)
    return folder


@pytest.fixture(scope="session")
def build_family(tokenizer, vocabulary, shards):
    """Function: name of a family -> its checkpoint and export, written once."""

    @cache
    def build(name):
        stock, overrides = FAMILIES[name]
        path = tokenizer.parent / name
        config = family_config(f"data.shards={shards}", *overrides)
        checkpoint = write_random_checkpoint(path / "run", config, vocabulary)
        metadata = export_checkpoint(checkpoint, tokenizer, path / "export")
        return SimpleNamespace(
            stock=stock,
            checkpoint=checkpoint,
            export=path / "export",
            metadata=metadata,
            config=config,
            reader=CheckpointReader(checkpoint),
        )

    return build


@pytest.fixture(params=FAMILIES)
def family(request, build_family):
    """A checkpoint and its export: .checkpoint, .export (folders), .metadata, .reader, .stock (class name)."""
    return build_family(request.param)
