"""Export: a trained checkpoint becomes a folder that stock `OPTForCausalLM.from_pretrained` loads.

The paper's layers (pre-LayerNorm without parameters, no bias, learned positions, tied embeddings) are exactly
OPT's with `enable_bias=False, layer_norm_elementwise_affine=False`. What changes is the arrangement:

    rows of linear_qkv, grouped per head as q k v    -> q_proj, k_proj, v_proj
    position_embeddings [S, h]                       -> embed_positions [S + 2, h], two zero rows in front
    vocabulary rows                                  -> the true ones, without the model's padding

The folder also holds the tokenizers (text.model, image/, vocab.json) and cm3leon.json, which says how the
model was trained: it alone is enough to generate. It gets its name only after the stock class has loaded it
and given the trained model's logits.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_cm3leon.checkpoint.reference import reference_logits
from megatron_cm3leon.config import Config
from megatron_cm3leon.model.weights import POSITION_EMBEDDINGS, WORD_EMBEDDINGS, canonical_shapes, layer_name
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_LOGIT_DIFFERENCE = 1e-5
SHARD_BYTES = 4 << 30
CHECKED_POSITIONS = 1024
"""Positions of the comparison of logits; a longer context is compared up to here."""
POSITION_OFFSET = 2
"""OPT's learned positions begin at row 2; the rows before it are never read."""
TOKENIZER_FILES = ("text.model", "image", "vocab.json")


def export_checkpoint(
    checkpoint: str | Path,
    tokenizer: str | Path,
    output: str | Path,
    *,
    dtype: str = "fp32",
    reader=None,
    trained_logits: Callable[[Tensor, torch.dtype], Tensor] | None = None,
) -> dict:
    """Write `output` from a checkpoint folder; return its account, also written to `output`/cm3leon.json.

    `reader` replaces `read_weights(checkpoint)`; `trained_logits(ids [B, S], dtype) -> [B, S, vocabulary]` replaces
    the plain reference forward as what the export is compared with. ValueError for an input that cannot be
    exported and for an export whose logits differ; nothing stays under `output` then.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype!r}) must be one of: {', '.join(DTYPES)}.")
    if reader is None:
        from megatron_cm3leon.checkpoint.sharded import read_weights

        reader = read_weights(Path(checkpoint))
    tokenizer = Path(tokenizer)
    vocabulary = _check_tokenizer(tokenizer, reader.vocabulary, checkpoint)
    _check_names(reader, canonical_shapes(reader.config, vocabulary.size), checkpoint)
    with _written_whole(Path(output)) as folder:
        read = _checked_read(reader, checkpoint, DTYPES[dtype])
        parameters = _write_weights(folder, read, reader.config, vocabulary.size, DTYPES[dtype])
        _write_configs(folder, reader.config, vocabulary, dtype)
        _copy_tokenizers(tokenizer, folder)
        difference, relative = compare_logits(folder, reader, DTYPES[dtype], trained_logits)
        if not (difference <= LARGEST_LOGIT_DIFFERENCE and relative <= LARGEST_LOGIT_DIFFERENCE):
            raise ValueError(
                f"the exported model's logits differ from the trained model's by {difference:.3g} (in fp32 by "
                f"{relative:.3g} of the largest logit; at most {LARGEST_LOGIT_DIFFERENCE:g} is allowed for each); "
                f"nothing was written to {output}."
            )
        account = {
            "format": 1,
            "checkpoint": str(checkpoint),
            "dtype": dtype,
            "parameters": parameters,
            "max_abs_logit_diff": difference,
            "max_relative_logit_diff_fp32": relative,
            "training": _training_facts(reader.config),
        }
        (folder / "cm3leon.json").write_text(json.dumps(account, indent=2) + "\n")
    return account


def _check_tokenizer(folder: Path, expected: Vocabulary, checkpoint) -> Vocabulary:
    vocabulary = Vocabulary.load(folder)
    check_same_vocabulary(expected, vocabulary, f"tokenizer folder {folder}")
    for name in TOKENIZER_FILES:
        if not (folder / name).exists():
            raise ValueError(
                f"tokenizer folder {folder} has no {name}; give the folder that {checkpoint} was trained "
                f"with, as tools/train_tokenizer.py wrote it."
            )
    return vocabulary


def _check_names(reader, expected: dict[str, tuple[int, ...]], checkpoint) -> None:
    """Every weight of the family is there, with its shape, and no other."""
    if reader.config.model.family != "cm3leon":
        raise ValueError(
            f"model.family ({reader.config.model.family!r}) of {checkpoint} has no export to OPT; it must be 'cm3leon'."
        )
    found = set(reader.names)
    missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or extra:
        parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        parts += [f"{len(extra)} unknown ({_some(extra)})"] if extra else []
        raise ValueError(
            f"{checkpoint} does not hold the weights of its own configuration: {' and '.join(parts)}. "
            f"Export a checkpoint that training finished writing."
        )
    for name, shape in expected.items():
        if tuple(reader.shape(name)) != shape:
            raise ValueError(f"{name} of {checkpoint} has shape {tuple(reader.shape(name))}; {shape} is required.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _checked_read(reader, checkpoint, dtype: torch.dtype) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        weight = reader.read(name).to(dtype)
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"{name} of {checkpoint} has NaN or infinite values as {str(dtype).removeprefix('torch.')}; "
                f"export an earlier checkpoint."
            )
        return weight

    return read


@contextmanager
def _written_whole(output: Path):
    """A temporary folder beside `output`, renamed to it at the end and removed on any error."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} already exists and is not empty; give a new folder or remove it first.")
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.tmp-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def split_qkv(weight: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value matrices [h, h] from rows grouped per head [3h, h]."""
    rows, hidden = weight.shape
    query, key, value = weight.view(heads, 3, rows // (3 * heads), hidden).unbind(1)
    return tuple(part.reshape(rows // 3, hidden) for part in (query, key, value))


def _opt_parts(config: Config) -> list[tuple[str, Callable[[Tensor], dict[str, Tensor]]]]:
    """Canonical names in file order, each with what its weight becomes in OPT's names."""

    def positions(weight: Tensor) -> dict[str, Tensor]:
        zeros = weight.new_zeros(POSITION_OFFSET, weight.shape[1])
        return {"model.decoder.embed_positions.weight": torch.cat([zeros, weight])}

    def qkv(prefix: str):
        def split(weight: Tensor) -> dict[str, Tensor]:
            parts = split_qkv(weight, config.model.heads)
            return {f"{prefix}.self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}

        return split

    def renamed(name: str):
        return lambda weight: {name: weight}

    parts = [(WORD_EMBEDDINGS, renamed("model.decoder.embed_tokens.weight")), (POSITION_EMBEDDINGS, positions)]
    for layer in range(config.model.layers):
        prefix = f"model.decoder.layers.{layer}"
        parts += [
            (layer_name(layer, "self_attention.linear_qkv"), qkv(prefix)),
            (layer_name(layer, "self_attention.linear_proj"), renamed(f"{prefix}.self_attn.out_proj.weight")),
            (layer_name(layer, "mlp.linear_fc1"), renamed(f"{prefix}.fc1.weight")),
            (layer_name(layer, "mlp.linear_fc2"), renamed(f"{prefix}.fc2.weight")),
        ]
    return parts


def _write_weights(folder: Path, read, config: Config, vocabulary_size: int, dtype: torch.dtype) -> int:
    """Write safetensors of at most SHARD_BYTES, one of them in memory at a time; return the parameters."""
    shapes = canonical_shapes(config, vocabulary_size)
    groups, filled = [[]], 0
    for part in _opt_parts(config):
        size = shapes[part[0]][0] * shapes[part[0]][1] * dtype.itemsize
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for canonical, arrange in group:
            tensors.update(arrange(read(canonical)))
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(value.numel() for value in tensors.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total - POSITION_OFFSET * config.model.hidden_size


def _write_configs(folder: Path, config: Config, vocabulary: Vocabulary, dtype: str) -> None:
    """config.json in plain fields, which any version of the class reads, and generation_config.json."""
    model = config.model
    ids = {"bos_token_id": vocabulary.eos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}
    fields = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": vocabulary.size,
        "hidden_size": model.hidden_size,
        "word_embed_proj_dim": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "ffn_dim": model.ffn_hidden_size or 4 * model.hidden_size,
        "max_position_embeddings": config.data.seq_length,
        "activation_function": model.activation,
        "do_layer_norm_before": True,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": model.init_std,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
        **ids,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def _copy_tokenizers(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        else:
            shutil.copy2(source / name, folder / name)


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


@torch.no_grad()
def compare_logits(folder: Path, reader, dtype: torch.dtype, trained_logits=None) -> tuple[float, float]:
    """Largest |logit difference| between stock OPT loaded from `folder` and the trained model.

    Returns (absolute, in fp64 arithmetic; relative to the largest logit, in fp32 arithmetic). The weights are
    those of the files in both. fp64 shows whether the models are the same function; two correct fp32
    evaluations differ by rounding alone (2e-5 where logits reach 14). With an export in bf16 or fp16 the
    reference has its weights rounded alike: the arrangement is checked.
    """
    model = _load_stock(folder)
    length = min(reader.config.data.seq_length, CHECKED_POSITIONS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(reader.vocabulary.size, (2, length), generator=generator)
    if trained_logits is None:

        def trained_logits(ids: Tensor, precision: torch.dtype) -> Tensor:
            return reference_logits(lambda name: reader.read(name).to(dtype).to(precision), reader.config, ids)

    differences, largest = {}, 0.0
    for precision in (torch.float32, torch.float64):
        expected = trained_logits(ids, precision)[..., : reader.vocabulary.size].cpu()
        differences[precision] = (model.to(precision)(ids).logits - expected).abs().max().item()
        largest = expected.abs().max().item()
    return differences[torch.float64], differences[torch.float32] / largest


def _load_stock(folder: Path):
    """The exported folder as stock transformers loads it; ValueError for a tensor too few or too many."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, loading = transformers.OPTForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="sdpa",  # eager attention rounds its softmax to fp32 in any precision
        output_loading_info=True,
        local_files_only=True,
    )
    # lm_head is the embedding table itself in a tied model: no tensor of its own is in the file.
    missing = [name for name in loading["missing_keys"] if name != "lm_head.weight"]
    if missing or loading["unexpected_keys"]:
        raise ValueError(
            f"OPTForCausalLM misses {missing} and does not know {loading['unexpected_keys']} in the export."
        )
    return model.eval()
