"""Export: a checkpoint of any layout and engine becomes a folder that a stock transformers class loads.

The folder gets its name only after the stock class, on the files just written, gave the trained model's logits.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.common.atomic_directory import written_whole
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.export.card import write_card
from megatron_cm3leon.export.check import compare_logits, find_shards, require_passed
from megatron_cm3leon.export.folder import (
    ACCOUNT,
    ACCOUNT_FORMAT,
    DTYPES,
    ExportFolder,
    check_output,
    describe_names,
    write_json,
    write_weights,
)
from megatron_cm3leon.export.layouts import Part, config_fields, list_parts, special_ids, stock_class
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
    """Write `output` from a checkpoint, or a run's newest; return its account, also written to `output`/cm3leon.json.

    `tokenizer` is the folder that training had. The check reads a document of `check_shards`, by default of the run's
    own shards where they still are; every line of `check_corpus` must have the ids of text.model in tokenizer.json.
    ValueError for an input that cannot be exported and for an export that differs; `output` is then as it was.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype!r}) must be one of: {', '.join(DTYPES)}.")
    if shard_bytes < 1:
        raise ValueError(f"shard size ({shard_bytes} bytes) must be at least 1.")
    checkpoint = _find_checkpoint(Path(checkpoint))
    reader = CheckpointReader(checkpoint)
    config, vocabulary = reader.config, reader.vocabulary
    tokenizers = _load_tokenizers(Path(tokenizer), reader)
    parts = list_parts(config, vocabulary.size)
    _check_weights(reader, parts)
    if check_shards is not None:  # now, not behind minutes of writing
        check_same_vocabulary(vocabulary, open_shards(check_shards).vocabulary, f"shard folder {check_shards}")

    def read(name: str) -> Tensor:
        return reader.read(name).to(DTYPES[dtype])

    check_output(Path(output), overwrite)
    with written_whole(Path(output)) as folder:
        write_json(folder / "config.json", config_fields(config, vocabulary, DTYPES[dtype]))
        write_json(folder / "generation_config.json", special_ids(vocabulary))
        _copy_tokenizers(Path(tokenizer), folder)
        why_not = write_tokenizer(folder, tokenizers.text, vocabulary, config.data.seq_length)
        lines = 0
        if check_corpus is not None:
            if why_not:
                raise ValueError(f"--check-corpus {check_corpus}: {why_not}.")
            lines = compare_ids(folder, tokenizers.text, read_lines(check_corpus), str(check_corpus))
        with meter(sum(len(part.targets) for part in parts), "exporting", "tensors") as progress:
            write_weights(
                folder,
                parts,
                lambda name: _require_finite(read(name), name, reader),
                DTYPES[dtype],
                shard_bytes,
                progress.advance,
            )
        account = {
            "format": ACCOUNT_FORMAT,
            "checkpoint": str(checkpoint),
            "dtype": dtype,
            "class": stock_class(config),
            "parameters": count_parameters(config, vocabulary.size),
            "training": _training_facts(config),
            "config": asdict(config),
            "state": reader.state.to_dict(),
        }
        write_json(folder / ACCOUNT, account)
        export = ExportFolder(folder)
        export.check(config, parts)
        shards = check_shards or find_shards(config, vocabulary)
        comparison = compare_logits(lambda name: read(name).float(), config, export, shards)
        require_passed(comparison, output)
        account |= {
            "max_abs_logit_diff": comparison.max_abs_difference,
            "max_relative_logit_diff": comparison.relative,
            "check": comparison.describe(),
            "tokenizer_json": why_not or f"same ids as text.model{f' on {lines:,} lines' if lines else ''}",
        }
        write_json(folder / ACCOUNT, account)
        card = write_card(
            config, vocabulary, reader.state, dtype, account["parameters"], comparison.describe(), why_not
        )
        (folder / "README.md").write_text(card)
    return account


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
    """Every weight of the model is there, with its shape, and no other."""
    expected, found = {part.name for part in parts}, set(reader.names)
    if expected != found:
        differing = describe_names(sorted(expected - found), sorted(found - expected))
        raise ValueError(
            f"{reader.folder} does not hold the weights of its own configuration: {differing}. Export a checkpoint "
            f"that training finished writing."
        )
    reader.check_parameters({part.name: part.shape for part in parts})


def _require_finite(weight: Tensor, name: str, reader: CheckpointReader) -> Tensor:
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name} of {reader.folder} has NaN or infinite values as {str(weight.dtype).removeprefix('torch.')}; "
            f"export an earlier checkpoint{'' if weight.dtype == torch.float32 else ', or with --dtype fp32'}."
        )
    return weight


def _copy_tokenizers(source: Path, folder: Path) -> None:
    shutil.copy2(source / TEXT_MODEL, folder)
    shutil.copy2(source / VOCABULARY, folder)
    (folder / IMAGE_FOLDER).mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(source / IMAGE_FOLDER / name, folder / IMAGE_FOLDER)


def _training_facts(config: Config) -> dict:
    """What generation chooses its prompts by: which forms of a pair the model has seen."""
    index = config.retrieval.index or any(source.index for source in config.data.sources)
    return {
        "seq_length": config.data.seq_length,
        "packing": config.data.packing,
        "image_first_probability": config.data.image_first_probability,
        "retrieved_documents": config.retrieval.documents if index else 0,
        "cm3_probability": config.cm3.probability,
        "cm3_rotation_probability": config.cm3.rotation_probability,
    }
