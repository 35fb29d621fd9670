"""What a configuration must satisfy: choices, ranges, and layouts that can run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_cm3leon.config_fields import Config

VOCABULARY_ROW_MULTIPLE = 128
"""The model pads its vocabulary rows to a multiple of this, under every layout."""

_CHOICES = {
    "model.family": ("cm3leon",),
    "model.activation": ("relu", "gelu"),
    "data.packing": ("query", "stream"),
    "retrieval.choice": ("fixed", "uniform"),
    "train.precision": ("bf16", "fp32"),
    "train.device": ("auto", "cpu", "cuda"),
    "schedule.name": ("linear", "cosine", "constant"),
    "parallel.zero": (0, 1),
}

# field -> (lowest, highest); None is no bound.
_RANGES = {
    "model.layers": (1, None),
    "model.hidden_size": (1, None),
    "model.heads": (1, None),
    "model.init_std": (0, None),
    "model.position_init_std": (0, None),
    "model.dropout": (0, 0.99),
    "data.seq_length": (8, None),
    "data.image_first_probability": (0, 1),
    "data.workers": (0, None),
    "data.prefetch": (1, None),
    "retrieval.documents": (0, None),
    "retrieval.loss_weight": (0, None),
    "cm3.probability": (0, 1),
    "cm3.mean_spans": (0, None),
    "cm3.max_spans": (0, None),
    "cm3.rotation_probability": (0, 1),
    "parallel.tensor": (1, None),
    "parallel.pipeline": (1, None),
    "train.steps": (1, None),
    "train.global_batch_size": (1, None),
    "train.micro_batch_size": (1, None),
    "train.threads": (0, None),
    "train.stop_after": (0, None),
    "train.max_skipped": (0, None),
    "optimizer.learning_rate": (0, None),
    "optimizer.beta1": (0, 1),
    "optimizer.beta2": (0, 1),
    "optimizer.epsilon": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.clip": (0, None),
    "schedule.warmup_steps": (0, None),
    "schedule.floor": (0, 1),
    "checkpoint.interval": (1, None),
    "checkpoint.keep_last": (0, None),
    "validation.interval": (0, None),
    "validation.batches": (1, None),
}


def check_config(config: "Config", world_size: int | None) -> None:
    """Raise ValueError for the first field that breaks a rule; layouts against `world_size` where it is known."""
    _check_choices(config)
    _check_ranges(config)
    _check_layout(config, world_size)


def _get_field(config: "Config", path: str):
    """Value of a dotted field name, such as `model.layers`."""
    value = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_choices(config: "Config") -> None:
    for path, choices in _CHOICES.items():
        value = _get_field(config, path)
        if value not in choices:
            raise ValueError(f"{path} ({value!r}) must be one of: {', '.join(map(str, choices))}.")


def _check_ranges(config: "Config") -> None:
    for path, (lowest, highest) in _RANGES.items():
        value = _get_field(config, path)
        too_low = not value >= lowest  # also refuses NaN
        if too_low or (highest is not None and value > highest):
            bound = f"at least {lowest}" if highest is None else f"between {lowest} and {highest}"
            raise ValueError(f"{path} ({value}) must be {bound}.")


def _check_layout(config: "Config", world_size: int | None) -> None:
    model, parallel, train = config.model, config.parallel, config.train
    if model.hidden_size % model.heads:
        raise ValueError(
            f"model.hidden_size ({model.hidden_size}) must be divisible by model.heads ({model.heads}); "
            f"change one of them."
        )
    if model.heads % parallel.tensor:
        raise ValueError(
            f"parallel.tensor ({parallel.tensor}) must divide model.heads ({model.heads}); "
            f"use one of {_divisors(model.heads)}."
        )
    if model.ffn_hidden_size % parallel.tensor:
        raise ValueError(
            f"parallel.tensor ({parallel.tensor}) must divide model.ffn_hidden_size ({model.ffn_hidden_size})."
        )
    if VOCABULARY_ROW_MULTIPLE % parallel.tensor:
        raise ValueError(
            f"parallel.tensor ({parallel.tensor}) must divide {VOCABULARY_ROW_MULTIPLE}, to which vocabulary "
            f"rows are padded; use one of {_divisors(VOCABULARY_ROW_MULTIPLE)}."
        )
    if model.layers % parallel.pipeline:
        raise ValueError(
            f"parallel.pipeline ({parallel.pipeline}) must divide model.layers ({model.layers}); "
            f"use one of {_divisors(model.layers)}."
        )
    if world_size is None:
        return
    ranks = parallel.tensor * parallel.pipeline
    if world_size % ranks:
        raise ValueError(
            f"parallel.tensor ({parallel.tensor}) x parallel.pipeline ({parallel.pipeline}) = {ranks} must divide "
            f"the number of ranks ({world_size}); start {ranks * max(1, world_size // ranks)} ranks "
            f"(torchrun --nproc-per-node) or change parallel.tensor or parallel.pipeline."
        )
    blocks = train.micro_batch_size * (world_size // ranks)
    if train.global_batch_size % blocks:
        raise ValueError(
            f"train.global_batch_size ({train.global_batch_size}) must be divisible by train.micro_batch_size "
            f"({train.micro_batch_size}) x data-parallel ranks ({world_size // ranks}) = {blocks}."
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
