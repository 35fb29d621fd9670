"""Identity of a stream: a hash of everything that determines its sequences. A run records it and checks it on resume.

A configuration field at its default value is not part of the hash, so fields can be added. Version 1 (until 0.1.0) also
included train.global_batch_size, although that does not change the sequences; its hash is still computed, to
check runs that recorded it.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_cm3leon.config.loading import Config, is_fixed
from megatron_cm3leon.config.schema import SourceConfig
from megatron_cm3leon.data.stream.samples import Samples, SourceSamples

VERSION = 2
STREAM_VERSION = 1
"""Must be increased by every change of the code that changes a sequence."""
_ALWAYS = {
    "data": (
        "seq_length", "packing", "attention", "image_first_probability", "text_loss_weight", "image_loss_weight",
    ),
    "cm3": (
        "probability", "mean_spans", "min_spans", "max_spans", "sentinel_loss_weight", "rotation_probability",
    ),
    "retrieval": ("documents", "choice", "loss_weight"),
    "sft": (),
}  # fmt: skip
"""Fields that are always part of the hash. Fields added later are part of it if they are not at their default."""


def identify(sources: dict, config: Config, version: int = VERSION) -> str:
    """The identity of the stream of `sources` (from describe_sources) under `config`, 32 hexadecimal digits."""
    parts = {
        "version": sources["stream_version"],
        "sources": sources["sources"],
        "weights": sources["weights"],
        "data": _describe_section(config, "data"),
        "cm3": _describe_section(config, "cm3"),
        "seed": config.seed,
    }
    if version == 1:
        parts["global_batch_size"] = config.train.global_batch_size
    if any(len(source) > 1 for source in sources["sources"]):
        parts["retrieval"] = _describe_section(config, "retrieval")
    if sources.get("targets") and (sft := _describe_section(config, "sft")):
        parts["sft"] = sft
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def describe_sources(samples: Samples, config: Config) -> dict:
    """The parts of an identity besides the configuration, as a run's state records them (TrainState.stream_parts).

    "sources": hashes of each source's documents and, with retrieval, of its bank and its neighbor table. "targets":
    True if a source has instruction documents; otherwise there is no such key.
    """
    return {
        "version": VERSION,
        "stream_version": STREAM_VERSION,
        "weights": samples.mixture.weights,
        "sources": [_hash_source(source, config) for source in samples.sources],
        **({"targets": True} if samples.has_targets else {}),
    }


def compare_sources(recorded: dict, present: dict, config: Config, folder: Path) -> tuple[str, str]:
    """How the sources of a stream differ from those recorded in the checkpoint `folder`: (sentence, config field).

    ("", "") if they do not differ. `recorded` and `present` are from describe_sources.
    """
    mixed = bool(config.data.sources)
    shards_field, index_field = ("data.sources",) * 2 if mixed else ("data.shards", "retrieval.index")
    now, before = present["stream_version"], recorded["stream_version"]
    if now != before:
        what = f"this version of the code builds different sequences from the same data (stream version {now})"
        return f"{what} than the version that wrote {folder} (stream version {before})", shards_field
    now, before = len(present["sources"]), len(recorded["sources"])
    if now != before:
        return f"the data have {now} source{'s' * (now > 1)}, and had {before} in {folder}", shards_field
    now, before = present["weights"], recorded["weights"]
    if now != before:
        return f"the weights of data.sources have the ratio {now}, and had {before} in {folder}", shards_field
    configured = config.data.sources or [SourceConfig(shards=config.data.shards, index=config.retrieval.index)]
    for source, before, now in zip(configured, recorded["sources"], present["sources"], strict=True):
        if before[0] != now[0]:
            return f"the shards at {source.shards} are not those of {folder}", shards_field
        if before[1:] != now[1:] and config.retrieval.documents:
            if not now[1:]:
                return f"{source.shards} has no index, and had one in {folder}", index_field
            if not before[1:]:
                return f"{source.shards} has the index {source.index}, and had none in {folder}", index_field
            return f"the index at {source.index} is not that of {folder}", index_field
    return "", ""


def _hash_source(source: SourceSamples, config: Config) -> list[str]:
    if source.neighbors is None or not config.retrieval.documents:
        return [source.corpus.identity]
    return [source.corpus.identity, source.neighbors.bank.identity, _hash_table(source.neighbors.table)]


def _hash_table(table: np.ndarray) -> str:
    """Hash of the neighbor table's shape and of up to 4,096 evenly spaced rows."""
    rows = np.linspace(0, len(table) - 1, min(len(table), 4096)).astype(np.int64)
    sampled = np.ascontiguousarray(table[rows], np.int64)
    return hashlib.sha256(repr(table.shape).encode() + sampled.tobytes()).hexdigest()


def _describe_section(config: Config, name: str) -> dict:
    """The fields of a config section that are part of the identity."""
    section = getattr(config, name)
    defaults = asdict(type(section)())
    return {
        field: value
        for field, value in asdict(section).items()
        if is_fixed(f"{name}.{field}") and (field in _ALWAYS[name] or value != defaults[field])
    }
