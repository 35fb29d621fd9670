"""Train CM3Leon, a decoder-only transformer over text and image tokens: the public Python API.

| name | what it is for |
|---|---|
| `load_config`, `validate_config`, `Config` | the configuration of a run: YAML, presets, `section.key=value` |
| `Vocabulary`, `TextTokenizer`, `ImageTokenizer` | joint ids of text and image tokens; text and images as ids |
| `open_shards` | the tokenized documents of a shard folder |
| `build_stream`, `Stream`, `Loader` | the exact stream of training sequences; micro-batches of one rank |
| `Retriever` | documents of an index that fit a text or an image |
| `load_reference_model` | the trained model in plain PyTorch, from a checkpoint of any layout |
| `Generator`, `Sampling` | images, captions, answers, infilling, log-probabilities (`score`) from an exported model |

A name is imported from its module when it is first used: `import megatron_cm3leon` alone loads nothing.
examples/python_api.py uses each of them. What this list does not name may change in any version.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from megatron_cm3leon.common.version import __version__ as __version__

if TYPE_CHECKING:
    from megatron_cm3leon.checkpoint.reference_model import load_reference_model
    from megatron_cm3leon.config.loading import Config, load_config
    from megatron_cm3leon.config.validation import validate_config
    from megatron_cm3leon.data.shards.reader import open_shards
    from megatron_cm3leon.data.stream.loader import Loader
    from megatron_cm3leon.data.stream.stream import Stream, build_stream
    from megatron_cm3leon.generation.generator import Generator
    from megatron_cm3leon.generation.sampling import Sampling
    from megatron_cm3leon.retrieval.retriever import Retriever
    from megatron_cm3leon.tokenizers.image import ImageTokenizer
    from megatron_cm3leon.tokenizers.text import TextTokenizer
    from megatron_cm3leon.tokenizers.vocab import Vocabulary


__all__ = [
    "Config",
    "Generator",
    "ImageTokenizer",
    "Loader",
    "Retriever",
    "Sampling",
    "Stream",
    "TextTokenizer",
    "Vocabulary",
    "build_stream",
    "load_config",
    "load_reference_model",
    "open_shards",
    "validate_config",
]

_MODULES = {
    "Config": "config.loading",
    "Generator": "generation.generator",
    "ImageTokenizer": "tokenizers.image",
    "Loader": "data.stream.loader",
    "Retriever": "retrieval.retriever",
    "Sampling": "generation.sampling",
    "Stream": "data.stream.stream",
    "TextTokenizer": "tokenizers.text",
    "Vocabulary": "tokenizers.vocab",
    "build_stream": "data.stream.stream",
    "load_config": "config.loading",
    "load_reference_model": "checkpoint.reference_model",
    "open_shards": "data.shards.reader",
    "validate_config": "config.validation",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
