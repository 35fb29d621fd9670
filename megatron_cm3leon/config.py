"""The one configuration tree: dataclasses, presets, YAML, `section.key=value`, validate().

Precedence, lowest first: the defaults below, the preset, the YAML file, the command line.
`load_config` returns a tree of plain dataclasses whose every derived value is filled in.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

VOCABULARY_ROW_MULTIPLE = 128
"""The model pads its vocabulary rows to a multiple of this, under every layout."""


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the decoder-only transformer (CM3Leon section 2.3, table 3)."""

    family: str = "cm3leon"
    """cm3leon: pre-LayerNorm without parameters, no bias, learned positions, tied embeddings."""
    layers: int = 24
    """Transformer layers."""
    hidden_size: int = 1024
    """Width of the residual stream."""
    heads: int = 16
    """Attention heads; must divide hidden_size."""
    ffn_hidden_size: int = 0
    """Width of the feed-forward layer; 0 means 4 x hidden_size."""
    activation: str = "relu"
    """relu (OPT's) or gelu (the exact, erf form)."""
    init_std: float = 0.006
    """Standard deviation of the initial weights, a normal cut at 3 of them."""
    position_init_std: float = 0.0002
    """Standard deviation of the initial position embeddings."""
    dropout: float = 0.0
    """Dropout probability of embeddings, attention and residual branches (CM3Leon: none)."""


@dataclass(kw_only=True)
class DataConfig:
    """What is read, and how it becomes blocks of seq_length + 1 tokens."""

    shards: str = ""
    """Folder of shards that tools/preprocess_data.py wrote."""
    seq_length: int = 4096
    """Tokens the model sees at once; also the number of learned positions."""
    packing: str = "query"
    """query: every query its own block, whole, at the end; stream: samples concatenated and cut."""
    image_first_probability: float = 0.5
    """Probability, per document and epoch, that the picture of a pair comes before its text."""
    workers: int = 1
    """Loader processes a rank; 0 loads in the training process."""
    prefetch: int = 4
    """Batches a loader process prepares ahead."""


@dataclass(kw_only=True)
class RetrievalConfig:
    """Retrieved documents in front of the query document (CM3Leon section 2.1)."""

    index: str = ""
    """Index folder that tools/build_index.py wrote; empty trains without retrieval."""
    documents: int = 3
    """Retrieved documents in front of a query document."""
    choice: str = "fixed"
    """fixed: always `documents` of them (CM3Leon); uniform: 0 to `documents`, equally likely (RA-CM3)."""
    loss_weight: float = 1.0
    """Weight of the loss on retrieved documents (RA-CM3's alpha, 0.1 there; CM3Leon: 1)."""


@dataclass(kw_only=True)
class CM3Config:
    """Causal masking: spans move to the end of the block (CM3Leon section 2.2)."""

    probability: float = 1.0
    """Probability that a block is masked at all; 0 is plain autoregressive training."""
    mean_spans: float = 1.0
    """Mean of the Poisson distribution of the number of spans."""
    max_spans: int = 511
    """Largest number of spans in a block."""
    rotation_probability: float = 0.0
    """Probability that a masked block moves one whole segment instead of drawing spans."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Layout over the ranks; data parallel is what is left of them."""

    tensor: int = 1
    """Ranks over which each layer's matrices are partitioned; must divide model.heads."""
    pipeline: int = 1
    """Stages over which the layers are spread; must divide model.layers."""
    zero: int = 0
    """1 partitions the optimizer state over data-parallel ranks (megatron-core's distributed optimizer)."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch and precision of a run."""

    steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 32
    """Blocks in one step, over all ranks."""
    micro_batch_size: int = 1
    """Blocks in one forward pass of one rank."""
    precision: str = "bf16"
    """bf16 (with fp32 main weights and gradients) or fp32."""
    device: str = "auto"
    """auto, cpu or cuda; auto takes CUDA where there is a device for every local rank."""
    threads: int = 0
    """CPU threads a rank; 0 divides the cores among the ranks of this node."""
    stop_after: int = 0
    """Stop, with a checkpoint, once this step is reached; 0 goes on to `steps`."""
    max_skipped: int = 10
    """Batches in a row whose loss or gradient may be non-finite (and are skipped) before the run stops."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay."""

    learning_rate: float = 6e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors are not decayed."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    name: str = "linear"
    """linear, cosine or constant, after the warm-up."""
    warmup_steps: int = 1500
    """Steps of linear warm-up from 0."""
    floor: float = 0.1
    """Final learning rate as a share of the peak."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved."""

    interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 3
    """Complete checkpoints that are kept; 0 keeps all."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Loss on held-out documents while training."""

    shards: str = ""
    """Folder of held-out shards; empty validates nothing."""
    index: str = ""
    """Index folder of the held-out shards, whose bank is the training set."""
    interval: int = 0
    """Steps between validations; 0 never validates."""
    batches: int = 4
    """Global batches in one validation, the same ones each time."""


@dataclass(kw_only=True)
class Config:
    """One run."""

    preset: str = ""
    """350m, 760m or 7b: the paper's sizes with their optimizer settings; empty for none."""
    output: str = "runs/train"
    """Run folder."""
    seed: int = 1234
    """Seed of the initial weights, the stream and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    cm3: CM3Config = field(default_factory=CM3Config)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def validate(self, world_size: int | None = None) -> None:
        """Fill derived values and refuse what cannot run; `world_size` in ranks, where it is known.

        Raises ValueError with the field, its value, the requirement and the remedy.
        """
        if not self.model.ffn_hidden_size:
            self.model.ffn_hidden_size = 4 * self.model.hidden_size
        _check_choices(self)
        _check_ranges(self)
        _check_layout(self, world_size)

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that hold the same partition of the model."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)


PRESETS: dict[str, dict] = {
    # Layers, width, peak rate and warm-up are CM3Leon's table 3. Heads, the activation, Adam's betas,
    # epsilon, weight decay, clipping and the linear decay to 0.1 are OPT's: the paper does not print them.
    "350m": {
        "model": {"layers": 24, "hidden_size": 1024, "heads": 16},
        "optimizer": {"learning_rate": 6e-4},
        "train": {"global_batch_size": 2048},
    },
    "760m": {
        "model": {"layers": 24, "hidden_size": 1536, "heads": 16},
        "optimizer": {"learning_rate": 5e-4},
        "train": {"global_batch_size": 2048},
    },
    "7b": {
        "model": {"layers": 32, "hidden_size": 4096, "heads": 32},
        "optimizer": {"learning_rate": 1.2e-4},
        "train": {"global_batch_size": 2048},
    },
}

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

# What a resumed run may change only when it is told to (`--allow-change`): the model and the stream.
# Paths are not among them: the stream's fingerprint covers what lies behind them.
FIXED_FIELDS = (
    "seed",
    "model.",
    "data.seq_length",
    "data.packing",
    "data.image_first_probability",
    "retrieval.documents",
    "retrieval.choice",
    "retrieval.loss_weight",
    "cm3.",
    "train.global_batch_size",
)

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


def get_field(config: Config, path: str):
    """Value of a dotted field name, such as `model.layers`."""
    value = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_choices(config: Config) -> None:
    for path, choices in _CHOICES.items():
        value = get_field(config, path)
        if value not in choices:
            raise ValueError(f"{path} ({value!r}) must be one of: {', '.join(map(str, choices))}.")


def _check_ranges(config: Config) -> None:
    for path, (lowest, highest) in _RANGES.items():
        value = get_field(config, path)
        too_low = not value >= lowest  # also refuses NaN
        if too_low or (highest is not None and value > highest):
            bound = f"at least {lowest}" if highest is None else f"between {lowest} and {highest}"
            raise ValueError(f"{path} ({value}) must be {bound}.")


def _check_layout(config: Config, world_size: int | None) -> None:
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


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and `section.key=value` overrides into a Config; call validate() on it next.

    Raises ValueError for a missing file, a field that does not exist (with the nearest name) and a value
    of another type.
    """
    layers = []
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no configuration file at {path}.")
        try:
            layers.append(OmegaConf.load(path))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    for text in overrides or []:
        if "=" not in text:
            raise ValueError(f"{text!r} is no override; write section.key=value, such as parallel.tensor=2.")
    layers.append(OmegaConf.from_dotlist(list(overrides or [])))
    for layer in layers:
        _check_names(OmegaConf.to_container(layer))
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), *layers)
        if tree.preset:
            if tree.preset not in PRESETS:
                raise ValueError(f"preset ({tree.preset!r}) must be one of: {', '.join(PRESETS)}.")
            tree = OmegaConf.merge(OmegaConf.structured(Config), PRESETS[tree.preset], *layers)
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None)
        raise ValueError(f"{name or 'configuration'}: {error.msg or error}") from error


def _check_names(tree, schema=Config, prefix: str = "") -> None:
    """Refuse a field that the dataclasses do not have, with the nearest name."""
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the configuration'} must be a mapping of fields, not {tree!r}.")
    known = {item.name: item for item in fields(schema)}
    for name, value in tree.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {prefix}{nearest[0]}?" if nearest else f"; it has: {', '.join(known)}."
            raise ValueError(f"there is no field {prefix}{name}{hint}")
        section = known[name].type
        if is_dataclass(section):
            _check_names(value, section, f"{prefix}{name}.")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved tree as YAML; load_config reads it back to an equal Config."""
    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def changed_fields(old: Config, new: Config) -> dict[str, tuple]:
    """Dotted names of the fields that differ, with the old and the new value."""
    left, right = _flatten(asdict(old)), _flatten(asdict(new))
    return {name: (left.get(name), value) for name, value in right.items() if left.get(name) != value}


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
