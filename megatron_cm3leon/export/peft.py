"""Export of an adapter as stock `peft` loads it: adapter_config.json and adapter_model.safetensors.

A fused layer of this project is several layers of the stock class, which share A: it is repeated for q, k and v (and
for gate and up), and B is cut as the rows of the weight are (parts.py). So the stock class of the base (an export) with
this folder, `PeftModel.from_pretrained(model, folder)`, computes the logits of base and adapter. cm3leon.json names the
base.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.common.atomic_io import atomic_directory
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.patterns import LINEAR_LAYERS
from megatron_cm3leon.export.folder import check_output, write_json
from megatron_cm3leon.export.layouts import DTYPES, stock_class
from megatron_cm3leon.export.parts import list_parts
from megatron_cm3leon.export.reader import METADATA_FILE
from megatron_cm3leon.model.weights import layer_name, list_adapted

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""Of every name in peft's files, before the name in the stock class."""


def export_adapter(
    reader: CheckpointReader, output: str | Path, *, base: str | Path | None = None, dtype: str = "fp32"
) -> dict:
    """Write the adapters of a checkpoint to the folder `output`; returns the content of its cm3leon.json.

    `base`: export of the base, which adapter_config.json names; by default the folder that the checkpoint records.
    Raises ValueError for a checkpoint without adapters, one that trains other parts of the base as well (train.only),
    and for an `output` that is not new or empty.
    """
    config, output = reader.config, Path(output)
    if not config.lora.rank:
        raise ValueError(
            f"{reader.folder} has no adapters (lora.rank is 0); give a checkpoint of a run with lora.rank."
        )
    if config.train.only:
        raise ValueError(
            f"{reader.folder} also has weights of the base that were trained (train.only: "
            f"{', '.join(config.train.only)}), for which peft's files have no place; run merge, then export."
        )
    check_output(output)
    tensors, modules = _convert(reader, DTYPES[dtype])
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} of {reader.folder} has NaN or infinite values as {dtype}; export an earlier checkpoint."
            )
    init = reader.state.init
    metadata = {
        "format": "adapter-1",
        "checkpoint": str(reader.folder),
        "class": stock_class(config),
        "base": init,
        "dtype": dtype,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "state": reader.state.to_dict(),
    }
    with atomic_directory(output) as folder:
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, _describe_adapter(config, modules, str(base or init["folder"])))
        write_json(folder / METADATA_FILE, metadata)
    return metadata


def _convert(reader: CheckpointReader, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by peft's names, names of the layers in the stock class that have an adapter)."""
    config = reader.config
    parts = {part.name: part for part in list_parts(config, reader.vocabulary.size)}
    tensors, modules = {}, []
    for layer, word in sorted(list_adapted(config)):
        part = parts[layer_name(layer, LINEAR_LAYERS[word])]
        a, b = (reader.read(part.name.replace(".weight", f".lora_{letter}.weight")).to(dtype) for letter in "AB")
        for target, rows in zip(part.targets, part.split(b), strict=True):
            module = target.removesuffix(".weight")
            modules.append(module)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.clone()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = rows.contiguous()
    return tensors, modules


def _describe_adapter(config: Config, modules: list[str], base: str) -> dict:
    """Content of adapter_config.json, in fields that every version of peft knows."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": _shorten(modules, config.model.layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _shorten(modules: list[str], layers: int) -> list[str]:
    """Short names (q_proj) where each is adapted in all layers, as servers expect them; otherwise full names."""
    short = sorted({module.rpartition(".")[2] for module in modules})
    return short if len(modules) == len(short) * layers else sorted(modules)
