"""DeepSpeed's JSON: what follows from the configuration, with a user's own settings merged in.

A key of the user's file that says the same as the configuration is accepted, one that contradicts it is refused by
name, and one that the configuration says nothing about is passed on to DeepSpeed.
"""

import json
from pathlib import Path

from megatron_cm3leon.config import Config

_NOT_HERE = object()
"""Stands for the value of a section whose part another section of the configuration plays."""


def build_settings(config: Config, data_size: int) -> dict:
    """Settings for `deepspeed.initialize` with `data_size` data-parallel ranks.

    Raises ValueError for a file that cannot be read and for a key of it that contradicts the configuration.
    """
    settings = _settings(config, data_size)
    if config.deepspeed.json:
        extra = _read(Path(config.deepspeed.json))
        _merge(settings, _without_agreement(extra, _governed(config, settings), config.deepspeed.json))
    if config.parallel.zero == 0:
        settings["gradient_clipping"] = 0.0  # engine/deepspeed.py clips: DeepSpeed's norm is not global there
    return settings


def _settings(config: Config, data_size: int) -> dict:
    train, parallel, offload = config.train, config.parallel, config.deepspeed
    zero = {
        "stage": parallel.zero,
        "overlap_comm": parallel.overlap and data_size > 1,
        # DeepSpeed's 500 million take 2 GB of every rank.
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        # It would replace torch.nn.functional.linear for the whole process.
        "memory_efficient_linear": False,
    }
    if offload.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * data_size),
        "gradient_clipping": config.optimizer.clip,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # on a CPU torch's AdamW: DeepSpeed's takes 40 s to compile
    }
    if parallel.zero:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _governed(config: Config, settings: dict) -> dict[str, tuple[object, str]]:
    """Keys of DeepSpeed that the configuration decides -> (their value here, the fields that decide)."""
    options, offload = config.optimizer, config.deepspeed
    adam = {"lr": options.learning_rate, "betas": [options.beta1, options.beta2], "eps": options.epsilon}
    optimizer = {"type": "AdamW"} | {f"params.{name}": value for name, value in adam.items()}
    optimizer |= {"params.weight_decay": options.weight_decay, "params.torch_adam": True, "params.adam_w_mode": True}
    devices = {
        name: "cpu" if chosen else "none"
        for name, chosen in (("optimizer", offload.offload_optimizer), ("param", offload.offload_parameters))
    }
    return {
        "train_batch_size": (settings["train_batch_size"], "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (settings["train_micro_batch_size_per_gpu"], "train.micro_batch_size"),
        "gradient_accumulation_steps": (
            settings["gradient_accumulation_steps"],
            "train.global_batch_size / (train.micro_batch_size x data-parallel ranks)",
        ),
        "managed_gradient_accumulation": (True, "train.global_batch_size"),
        "gradient_clipping": (options.clip, "optimizer.clip"),
        "bf16.enabled": (settings["bf16"]["enabled"], "train.precision"),
        "bfloat16.enabled": (settings["bf16"]["enabled"], "train.precision"),
        "bf16.bf16_master_weights_and_grads": (False, "train.precision"),
        "bf16.bf16_optimizer_states": (False, "train.precision"),
        "fp16.enabled": (False, "train.precision"),
        "amp.enabled": (False, "train.precision"),
        "torch_autocast.enabled": (False, "train.precision"),
        "zero_optimization.stage": (config.parallel.zero, "parallel.zero"),
        "zero_optimization.overlap_comm": (settings["zero_optimization"]["overlap_comm"], "parallel.overlap"),
        "zero_optimization.offload_optimizer.device": (devices["optimizer"], "deepspeed.offload_optimizer"),
        "zero_optimization.offload_param.device": (devices["param"], "deepspeed.offload_parameters"),
        "zero_optimization.cpu_offload": (offload.offload_optimizer, "deepspeed.offload_optimizer"),
        "zero_optimization.cpu_offload_param": (offload.offload_parameters, "deepspeed.offload_parameters"),
        # Its reordering is not in the places of fragments that checkpoints are written by.
        "zero_optimization.round_robin_gradients": (False, "checkpoints under canonical names"),
        "tensor_parallel": (_NOT_HERE, "parallel.tensor"),
        "scheduler": (_NOT_HERE, "section schedule"),
        **{f"optimizer.{name}": (value, "section optimizer") for name, value in optimizer.items()},
    }


def _read(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"deepspeed.json ({path}) is no file; give the path of a DeepSpeed JSON or leave it out.")
    try:
        extra = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"deepspeed.json ({path}) is not valid JSON: {error}.") from error
    if not isinstance(extra, dict):
        raise ValueError(f"deepspeed.json ({path}) must hold an object of settings, not {extra!r}.")
    return extra


def _without_agreement(extra: dict, governed: dict, path: str, prefix: str = "") -> dict:
    """`extra` without the keys that say what the configuration says; ValueError at one that contradicts it."""
    kept = {}
    for name, value in extra.items():
        key = prefix + name
        if value == "auto":
            continue  # Hugging Face's word for: as the trainer's configuration says
        if key in governed:
            ours, field = governed[key]
            if value == ours:
                continue
            if ours is _NOT_HERE:
                raise ValueError(f"deepspeed.json ({path}): {key} ({value}) is decided by {field}; remove it there.")
            raise ValueError(
                f"deepspeed.json ({path}): {key} ({value!r}) contradicts {field}, which makes it {ours!r}; remove it "
                f"there or change {field}."
            )
        if isinstance(value, dict):
            kept[name] = _without_agreement(value, governed, path, key + ".")
            if value and not kept[name]:
                del kept[name]
        elif prefix.startswith("optimizer."):
            raise ValueError(f"deepspeed.json ({path}): {key} ({value!r}) is no field of section optimizer; remove it.")
        else:
            kept[name] = value
    return kept


def _merge(settings: dict, extra: dict) -> None:
    for name, value in extra.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value
