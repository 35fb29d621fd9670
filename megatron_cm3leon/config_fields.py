"""Every field of the configuration with its default: one dataclass a section. config.py loads and checks them."""

from dataclasses import dataclass, field

from megatron_cm3leon.config_rules import check_config


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
        check_config(self, world_size)

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that hold the same partition of the model."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)
