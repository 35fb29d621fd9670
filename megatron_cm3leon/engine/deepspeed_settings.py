"""DeepSpeed's JSON: what follows from the configuration, with a user's own settings merged in.

A key of the user's file that has the same effect as the configuration is accepted, one that contradicts it is refused
by name, and one that the configuration says nothing about is passed on to DeepSpeed. "auto", null and an empty section
say nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_cm3leon.config.loading import Config

_NOT_HERE = object()
"""Stands for the value of a section whose part another section of the configuration plays."""


@dataclass(frozen=True)
class Governed:
    """A key of DeepSpeed that the configuration decides."""

    value: object
    """What the configuration makes it."""
    field: str
    """The fields that decide."""
    equal: tuple = ()
    """Other values that have the same effect."""


def build_settings(config: Config, data_size: int) -> dict:
    """Settings for `deepspeed.initialize` with `data_size` data-parallel ranks.

    Raises ValueError for a file that cannot be read and for a key of it that contradicts the configuration.
    """
    settings = _settings(config, data_size)
    if config.deepspeed.json:
        extra = _read(Path(config.deepspeed.json))
        governed = _governed(config, settings, data_size)
        _merge(settings, _without_agreement(extra, governed, config.deepspeed.json))
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


def _governed(config: Config, settings: dict, data_size: int) -> dict[str, Governed]:
    """Keys of DeepSpeed, with their sections, that the configuration decides."""
    parallel, offload, clip = config.parallel, config.deepspeed, config.optimizer.clip
    accumulated = settings["gradient_accumulation_steps"]
    accumulated_by = "train.global_batch_size / (train.micro_batch_size x data-parallel ranks)"
    micro = Governed(settings["train_micro_batch_size_per_gpu"], "train.micro_batch_size")
    in_bf16, not_in = Governed(settings["bf16"]["enabled"], "train.precision"), Governed(False, "train.precision")
    partitions_gradients = parallel.zero in (1, 2) and data_size > 1
    overlap = Governed(
        parallel.overlap,
        "parallel.overlap",
        () if parallel.zero and data_size > 1 else (True, False),  # else there is nothing to overlap
    )
    # Its reordering is not in the places of fragments that checkpoints are written by.
    in_order = Governed(False, "parallel.zero", () if partitions_gradients else (True,))
    return {
        "train_batch_size": Governed(settings["train_batch_size"], "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": Governed(accumulated, accumulated_by),
        "managed_gradient_accumulation": Governed(True, "train.global_batch_size"),
        "gradient_clipping": Governed(clip, "optimizer.clip"),
        "bf16.enabled": in_bf16,
        "bfloat16.enabled": in_bf16,
        "bf16.bf16_master_weights_and_grads": not_in,
        "bf16.bf16_optimizer_states": not_in,
        "fp16.enabled": not_in,
        "amp.enabled": not_in,
        "torch_autocast.enabled": not_in,
        "zero_optimization.stage": Governed(parallel.zero, "parallel.zero"),
        "zero_optimization.overlap_comm": overlap,
        "zero_optimization.offload_optimizer.device": Governed(
            "cpu" if offload.offload_optimizer else "none", "deepspeed.offload_optimizer"
        ),
        "zero_optimization.offload_param.device": Governed(
            "cpu" if offload.offload_parameters else "none", "deepspeed.offload_parameters"
        ),
        "zero_optimization.cpu_offload": Governed(offload.offload_optimizer, "deepspeed.offload_optimizer"),
        "zero_optimization.cpu_offload_param": Governed(offload.offload_parameters, "deepspeed.offload_parameters"),
        "zero_optimization.round_robin_gradients": in_order,
        "tensor_parallel": Governed(_NOT_HERE, "parallel.tensor"),
        "tensor_parallel.autotp_size": Governed(parallel.tensor, "parallel.tensor", (0,) * (parallel.tensor == 1)),
        "scheduler": Governed(_NOT_HERE, "section schedule"),
        **_governed_by_optimizer(config),
    }


def _governed_by_optimizer(config: Config) -> dict[str, Governed]:
    """Keys of the section `optimizer`: AdamW, whichever implementation; DeepSpeed's Adam is AdamW by default."""
    options = config.optimizer
    values = {"lr": options.learning_rate, "betas": [options.beta1, options.beta2], "eps": options.epsilon}
    values |= {"weight_decay": options.weight_decay, "adam_w_mode": True, "amsgrad": False, "bias_correction": True}
    governed = {f"optimizer.params.{name}": Governed(value, "section optimizer") for name, value in values.items()}
    governed["optimizer.params.torch_adam"] = Governed(True, "section optimizer", (False,))
    governed["optimizer.type"] = Governed("AdamW", "section optimizer", ("adamw", "Adam", "adam"))
    return governed


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


def _without_agreement(extra: dict, governed: dict[str, Governed], path: str, prefix: str = "") -> dict:
    """`extra` without the keys that say what the configuration says; ValueError at one that contradicts it."""
    kept = {}
    for name, value in extra.items():
        key = prefix + name
        if value in ("auto", None, {}):
            continue  # "auto" is Hugging Face's word for: as the trainer's configuration says
        if isinstance(value, dict):
            value = _without_agreement(value, governed, path, key + ".")
            if not value:
                continue
        elif any(each.startswith(f"{key}.") for each in governed):
            raise ValueError(f"deepspeed.json ({path}): {key} ({value!r}) must be an object of settings; correct it.")
        if key in governed:
            _check_agreement(key, value, governed[key], path)
        elif prefix.startswith("optimizer."):
            raise ValueError(f"deepspeed.json ({path}): {key} ({value!r}) is no field of section optimizer; remove it.")
        else:
            kept[name] = value
    return kept


def _check_agreement(key: str, value: object, ours: Governed, path: str) -> None:
    """ValueError where a key of the user's file contradicts the configuration."""
    if value == ours.value or value in ours.equal:
        return
    if ours.value is _NOT_HERE:
        raise ValueError(f"deepspeed.json ({path}): {key} ({value}) is decided by {ours.field}; remove it there.")
    raise ValueError(
        f"deepspeed.json ({path}): {key} ({value!r}) contradicts {ours.field}, which makes it {ours.value!r}; remove "
        f"it there or change {ours.field}."
    )


def _merge(settings: dict, extra: dict) -> None:
    for name, value in extra.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value
