"""Export: a checkpoint of any layout and engine becomes a folder that a stock transformers class loads.

The folder appears under its name only after the stock class, on the files just written, has given the trained model's
logits.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.common.atomic_io import atomic_directory
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.export.card import write_card
from megatron_cm3leon.export.check import compare_logits, find_shards, require_passed
from megatron_cm3leon.export.folder import (
    IMAGE_FILES,
    METADATA_FORMAT,
    ExportFolder,
    check_output,
    describe_names,
    write_json,
    write_weights,
)
from megatron_cm3leon.export.layouts import DTYPES, config_fields, special_ids, stock_class
from megatron_cm3leon.export.parts import Part, list_parts
from megatron_cm3leon.export.reader import METADATA_FILE
from megatron_cm3leon.export.tokenizer_json import compare_ids, read_lines, write_tokenizer
from megatron_cm3leon.model.weights import count_parameters
from megatron_cm3leon.tokenizers.folder import IMAGE_FOLDER, TEXT_MODEL, VOCABULARY, Tokenizers
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

SHARD_BYTES = 5 * 10**9


def export_checkpoint(
    checkpoint: str | Path,
    tokenizer: str | Path,
    output: str | Path,
    *,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    check_shards: str | Path | None = None,
    check_corpus: str | Path | None = None,
    overwrite: bool = False,
) -> dict:
    """Write `output` from a checkpoint, or a run's newest; return the content of `output`/cm3leon.json.

    `tokenizer` is the folder that training used. The check reads a document of `check_shards`, by default of the run's
    own shards where they still exist; for every line of `check_corpus`, tokenizer.json must give the ids of text.model.
    ValueError for input that cannot be exported and for an export whose logits differ; `output` is then unchanged.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype!r}) must be one of: {', '.join(DTYPES)}.")
    if shard_bytes < 1:
        raise ValueError(f"shard size ({shard_bytes} bytes) must be at least 1.")
    output = Path(output)
    reader = CheckpointReader(_find_checkpoint(Path(checkpoint)))
    config, vocabulary = reader.config, reader.vocabulary
    tokenizers = _load_tokenizers(Path(tokenizer), reader)
    parts = list_parts(config, vocabulary.size)
    _check_weights(reader, parts)
    if check_shards is not None:  # now, not after minutes of writing
        check_same_vocabulary(vocabulary, open_shards(check_shards).vocabulary, f"shard folder {check_shards}")
    check_output(output, overwrite)

    def read(name: str) -> Tensor:
        return reader.read(name).to(DTYPES[dtype])

    with atomic_directory(output) as folder:
        write_json(folder / "config.json", config_fields(config, vocabulary, DTYPES[dtype]))
        write_json(folder / "generation_config.json", special_ids(vocabulary))
        _copy_tokenizers(Path(tokenizer), folder)
        why_not, lines = _write_tokenizer_json(folder, tokenizers, config, check_corpus)
        with meter(sum(len(part.targets) for part in parts), "exporting", "tensors") as progress:
            checked = partial(_read_finite, read, reader.folder)
            write_weights(folder, parts, checked, DTYPES[dtype], shard_bytes, progress.advance)
        metadata = _describe_export(reader, dtype)
        write_json(folder / METADATA_FILE, metadata)  # ExportFolder reads it
        export = ExportFolder(folder)
        export.check(config, parts)
        shards = check_shards or find_shards(config, vocabulary)
        comparison = compare_logits(lambda name: read(name).float(), config, export, shards)
        require_passed(comparison, output)
        metadata |= {
            "max_abs_logit_diff": comparison.max_abs_difference,
            "max_relative_logit_diff": comparison.relative,
            "check": comparison.describe(),
            "tokenizer_json": why_not or f"same ids as text.model{f' on {lines:,} lines' if lines else ''}",
        }
        write_json(folder / METADATA_FILE, metadata)
        (folder / "README.md").write_text(write_card(config, vocabulary, reader.state, metadata, why_not))
    return metadata


def _write_tokenizer_json(
    folder: Path, tokenizers: Tokenizers, config: Config, check_corpus: str | Path | None
) -> tuple[str, int]:
    """Write tokenizer.json; return why there is none, or an empty string, and the number of compared lines."""
    why_not = write_tokenizer(folder, tokenizers.text, tokenizers.vocabulary, config.data.seq_length)
    if check_corpus is None:
        return why_not, 0
    if why_not:
        raise ValueError(f"--check-corpus {check_corpus}: {why_not}.")
    return why_not, compare_ids(folder, tokenizers.text, read_lines(check_corpus), str(check_corpus))


def _describe_export(reader: CheckpointReader, dtype: str) -> dict:
    """Content of cm3leon.json before the check."""
    config = reader.config
    return {
        "format": METADATA_FORMAT,
        "checkpoint": str(reader.folder),
        "dtype": dtype,
        "class": stock_class(config),
        "parameters": count_parameters(config, reader.vocabulary.size),
        "training": _describe_training(config),
        "config": asdict(config),
        "state": reader.state.to_dict(),
    }


def _find_checkpoint(folder: Path) -> Path:
    """The folder itself, or the newest checkpoint of a run folder."""
    run = folder.parent if folder.name == "checkpoints" else folder
    found = list_checkpoints(run)
    return found[-1] if found else folder


def _load_tokenizers(folder: Path, reader: CheckpointReader) -> Tokenizers:
    tokenizers = Tokenizers.load(folder)
    check_same_vocabulary(reader.vocabulary, tokenizers.vocabulary, f"tokenizer folder {folder}")
    return tokenizers


def _check_weights(reader: CheckpointReader, parts: list[Part]) -> None:
    """ValueError unless the checkpoint holds exactly the weights of `parts`, in their shapes."""
    reader.require_whole()
    expected, found = {part.name for part in parts}, set(reader.names)
    if expected != found:
        differing = describe_names(sorted(expected - found), sorted(found - expected))
        raise ValueError(
            f"{reader.folder} does not hold the weights of its own configuration: {differing}. Export a checkpoint "
            f"that training finished writing."
        )
    reader.check_parameters({part.name: part.shape for part in parts})


def _read_finite(read: Callable[[str], Tensor], folder: Path, name: str) -> Tensor:
    weight = read(name)
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name} of {folder} has NaN or infinite values as {str(weight.dtype).removeprefix('torch.')}; "
            f"export an earlier checkpoint{'' if weight.dtype == torch.float32 else ', or with --dtype fp32'}."
        )
    return weight


def _copy_tokenizers(source: Path, folder: Path) -> None:
    shutil.copy2(source / TEXT_MODEL, folder)
    shutil.copy2(source / VOCABULARY, folder)
    (folder / IMAGE_FOLDER).mkdir()
    for name in IMAGE_FILES:
        shutil.copy2(source / name, folder / name)


def _describe_training(config: Config) -> dict:
    """Which forms of a pair the model has seen: generation chooses its prompts by them."""
    index = config.retrieval.index or any(source.index for source in config.data.sources)
    return {
        "seq_length": config.data.seq_length,
        "packing": config.data.packing,
        "image_first_probability": config.data.image_first_probability,
        "retrieved_documents": config.retrieval.documents if index else 0,
        "cm3_probability": config.cm3.probability,
        "cm3_rotation_probability": config.cm3.rotation_probability,
        "cm3_infill_probability": config.cm3.infill_probability,
    }
