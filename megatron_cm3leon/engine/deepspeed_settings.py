"""DeepSpeed's JSON settings: derived from the configuration and merged with the user's file deepspeed.json.

A key of the user's file that agrees with the configuration is accepted, one that contradicts it is rejected by name,
and one that the configuration does not cover is passed on to DeepSpeed. "auto", null and an empty section are ignored.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_cm3leon.config.loading import Config

_UNSUPPORTED = object()
"""Value of a section that must not be in the user's file, because a section of the configuration replaces it."""


@dataclass(frozen=True)
class FixedKey:
    """A key of DeepSpeed whose value follows from the configuration."""

    value: object
    """Value that follows from the configuration."""
    field: str
    """Fields of the configuration that determine it."""
    equivalent: tuple = ()
    """Other values with the same effect."""


def build_settings(config: Config, data_size: int) -> dict:
    """Settings for `deepspeed.initialize` with `data_size` data-parallel ranks.

    Raises ValueError for a file that cannot be read and for a key in it that contradicts the configuration.
    """
    settings = _derive_settings(config, data_size)
    if config.deepspeed.json:
        extra = _read_json(Path(config.deepspeed.json))
        fixed = _list_fixed_keys(config, settings, data_size)
        _merge(settings, _drop_fixed_keys(extra, fixed, config.deepspeed.json))
    if config.parallel.zero == 0:
        settings["gradient_clipping"] = 0.0  # engine/deepspeed.py clips, because DeepSpeed's norm is not global there
    return settings


def _derive_settings(config: Config, data_size: int) -> dict:
    """Settings that follow from the configuration."""
    train, parallel, offload = config.train, config.parallel, config.deepspeed
    zero: dict[str, object] = {
        "stage": parallel.zero,
        "overlap_comm": parallel.overlap and data_size > 1,
        # DeepSpeed's default of 500 million takes 2 GB on every rank.
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for the whole process
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
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on a CPU, because DeepSpeed's takes 40 s to compile
    }
    if parallel.zero:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _list_fixed_keys(config: Config, settings: dict, data_size: int) -> dict[str, FixedKey]:
    """Keys of DeepSpeed, with their sections, whose values follow from the configuration."""
    parallel, offload, clip = config.parallel, config.deepspeed, config.optimizer.clip
    accumulation = settings["gradient_accumulation_steps"]
    accumulation_fields = "train.global_batch_size / (train.micro_batch_size x data-parallel ranks)"
    micro = FixedKey(settings["train_micro_batch_size_per_gpu"], "train.micro_batch_size")
    bf16, disabled = FixedKey(settings["bf16"]["enabled"], "train.precision"), FixedKey(False, "train.precision")
    partitions_gradients = parallel.zero in (1, 2) and data_size > 1
    overlap = FixedKey(
        parallel.overlap,
        "parallel.overlap",
        () if parallel.zero and data_size > 1 else (True, False),  # there is no communication to overlap
    )
    # Checkpoints use the positions of fragments, which do not contain DeepSpeed's reordering.
    in_order = FixedKey(False, "parallel.zero", () if partitions_gradients else (True,))
    return {
        "train_batch_size": FixedKey(settings["train_batch_size"], "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": FixedKey(accumulation, accumulation_fields),
        "managed_gradient_accumulation": FixedKey(True, "train.global_batch_size"),
        "gradient_clipping": FixedKey(clip, "optimizer.clip"),
        "bf16.enabled": bf16,
        "bfloat16.enabled": bf16,
        "bf16.bf16_master_weights_and_grads": disabled,
        "bf16.bf16_optimizer_states": disabled,
        "fp16.enabled": disabled,
        "amp.enabled": disabled,
        "torch_autocast.enabled": disabled,
        "zero_optimization.stage": FixedKey(parallel.zero, "parallel.zero"),
        "zero_optimization.overlap_comm": overlap,
        "zero_optimization.offload_optimizer.device": FixedKey(
            "cpu" if offload.offload_optimizer else "none", "deepspeed.offload_optimizer"
        ),
        "zero_optimization.offload_param.device": FixedKey(
            "cpu" if offload.offload_parameters else "none", "deepspeed.offload_parameters"
        ),
        "zero_optimization.cpu_offload": FixedKey(offload.offload_optimizer, "deepspeed.offload_optimizer"),
        "zero_optimization.cpu_offload_param": FixedKey(offload.offload_parameters, "deepspeed.offload_parameters"),
        "zero_optimization.round_robin_gradients": in_order,
        "tensor_parallel": FixedKey(_UNSUPPORTED, "parallel.tensor"),
        "tensor_parallel.autotp_size": FixedKey(parallel.tensor, "parallel.tensor", (0,) * (parallel.tensor == 1)),
        "scheduler": FixedKey(_UNSUPPORTED, "section schedule"),
        **_list_fixed_optimizer_keys(config),
    }


def _list_fixed_optimizer_keys(config: Config) -> dict[str, FixedKey]:
    """Keys of the section `optimizer`: AdamW in any implementation; DeepSpeed's Adam is AdamW by default."""
    options = config.optimizer
    values: dict[str, object] = {
        "lr": options.learning_rate,
        "betas": [options.beta1, options.beta2],
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
        "adam_w_mode": True,
        "amsgrad": False,
        "bias_correction": True,
    }
    fixed = {f"optimizer.params.{name}": FixedKey(value, "section optimizer") for name, value in values.items()}
    fixed["optimizer.params.torch_adam"] = FixedKey(True, "section optimizer", (False,))
    fixed["optimizer.type"] = FixedKey("AdamW", "section optimizer", ("adamw", "Adam", "adam"))
    return fixed


def _read_json(path: Path) -> dict:
    """Read the user's file; raises ValueError when it is missing or not a JSON object."""
    if not path.is_file():
        raise ValueError(f"deepspeed.json ({path}) does not exist; give the path of a DeepSpeed JSON file or omit it.")
    try:
        extra = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"deepspeed.json ({path}) is not valid JSON: {error}; correct the file.") from error
    if not isinstance(extra, dict):
        raise ValueError(
            f"deepspeed.json ({path}) must contain an object of settings, not {extra!r}; correct the file."
        )
    return extra


def _drop_fixed_keys(extra: dict, fixed: dict[str, FixedKey], path: str, prefix: str = "") -> dict:
    """`extra` without the keys that agree with the configuration; raises ValueError for one that contradicts it."""
    remaining = {}
    for name, value in extra.items():
        key = prefix + name
        if value in ("auto", None, {}):
            continue  # "auto" means in Hugging Face's files: the value of the trainer's configuration
        if isinstance(value, dict):
            value = _drop_fixed_keys(value, fixed, path, key + ".")
            if not value:
                continue
        elif any(each.startswith(f"{key}.") for each in fixed):
            raise ValueError(f"deepspeed.json ({path}): {key} ({value!r}) must be an object of settings; correct it.")
        if key in fixed:
            _check_agreement(key, value, fixed[key], path)
        elif prefix.startswith("optimizer."):
            raise ValueError(
                f"deepspeed.json ({path}): {key} ({value!r}) is not a field of section optimizer; remove it."
            )
        else:
            remaining[name] = value
    return remaining


def _check_agreement(key: str, value: object, fixed: FixedKey, path: str) -> None:
    """Raise ValueError when a key of the user's file contradicts the configuration."""
    if value == fixed.value or value in fixed.equivalent:
        return
    if fixed.value is _UNSUPPORTED:
        raise ValueError(f"deepspeed.json ({path}): {key} ({value}) is set by {fixed.field}; remove it from the file.")
    raise ValueError(
        f"deepspeed.json ({path}): {key} ({value!r}) contradicts {fixed.field}, which requires {fixed.value!r}; remove "
        f"it from the file or change {fixed.field}."
    )


def _merge(settings: dict, extra: dict) -> None:
    """Add `extra` to `settings`, section by section."""
    for name, value in extra.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value
