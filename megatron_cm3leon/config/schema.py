"""Every field of the configuration with its default: one dataclass a section. config.py loads and checks them."""

from dataclasses import dataclass, field

from megatron_cm3leon.config.validation import check_config, fill_family


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the decoder-only transformer (CM3Leon section 2.3, table 3)."""

    family: str = "cm3leon"
    """cm3leon: pre-LayerNorm without parameters, no bias, learned positions. llama: RMSNorm, RoPE, SwiGLU."""
    layers: int = 24
    """Transformer layers."""
    hidden_size: int = 1024
    """Width of the residual stream."""
    heads: int = 16
    """Attention heads; must divide hidden_size."""
    kv_heads: int = 0
    """Heads of keys and values (llama: grouped-query attention); 0 means as many as `heads`."""
    ffn_hidden_size: int = 0
    """Width of the feed-forward layer; 0 means 4 x hidden_size, or 8/3 x hidden_size in whole 256s (llama)."""
    activation: str = ""
    """cm3leon: relu (OPT's) or gelu (the exact, erf form); llama: swiglu. Empty means the family's first."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, one scale a head dimension (llama; Chameleon's QK-norm in Qwen3's form)."""
    rope_base: float = 10000.0
    """Base of the rotary wavelengths (llama)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in every norm."""
    tied_embeddings: bool | None = None
    """Whether the head is the word embedding; unset means the family's: cm3leon yes, llama no."""
    init_std: float = 0.006
    """Standard deviation of the initial weights, a normal cut at 3 of them."""
    position_init_std: float = 0.0002
    """Standard deviation of the initial position embeddings."""
    dropout: float = 0.0
    """Dropout probability of embeddings, attention and residual branches (CM3Leon: none)."""


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture."""

    shards: str = ""
    """Folder of shards that tools/preprocess_data.py wrote."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources' (0.7, 0.2, 0.1 are 7, 2, 1)."""
    index: str = ""
    """Index folder that tools/build_index.py wrote for these shards; empty: no retrieved documents in this source."""


@dataclass(kw_only=True)
class DataConfig:
    """What is read, and how it becomes blocks of seq_length + 1 tokens."""

    shards: str = ""
    """Folder of shards that tools/preprocess_data.py wrote."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources with weights, in place of `shards` and retrieval.index."""
    seq_length: int = 4096
    """Tokens the model sees at once; also the number of learned positions (cm3leon), which a resumed run keeps."""
    packing: str = "query"
    """query: every query its own block, whole, at the end; stream: samples concatenated and cut;
    stream_whole_images: no block begins inside a picture; documents: whole samples, best fit."""
    attention: str = "causal"
    """causal: a token sees all before it in its block; sample: only those of its own sample (packed sequences)."""
    image_first_probability: float = 0.5
    """Probability, per document and epoch, that the picture of a pair comes before its text."""
    text_loss_weight: float = 1.0
    """Factor of the loss weight of text tokens."""
    image_loss_weight: float = 1.0
    """Factor of the loss weight of image tokens."""
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
    min_spans: int = 0
    """Smallest number of spans in a masked block (CM3Leon: 0; CM3 and InCoder: 1)."""
    max_spans: int = 511
    """Largest number of spans in a block (CM3Leon: 511; CM3: 16; InCoder: 256)."""
    sentinel_loss_weight: float = 1.0
    """Factor of the loss weight of sentinels (CM3Leon: 1; CM3: 0)."""
    rotation_probability: float = 0.0
    """Probability that a masked block moves one whole segment instead of drawing spans."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Layout over the ranks; data parallel is what is left of them."""

    tensor: int = 1
    """Ranks over which each layer's matrices are partitioned; must divide model.heads and model.kv_heads."""
    pipeline: int = 1
    """Stages over which the layers are spread; must divide model.layers."""
    interleave: int = 1
    """Chunks of layers of each stage (interleaved schedule, less idle time); needs pipeline of 2 or more."""
    sequence: bool = False
    """Norms and dropout work on slices of the sequence over the tensor-parallel ranks."""
    context: int = 1
    """Ranks over which each sequence is spread, attention included; twice it must divide data.seq_length."""
    zero: int = 0
    """What is partitioned over data-parallel ranks: 1 optimizer state; with train.engine=deepspeed also 2 gradients,
    3 weights too."""
    overlap: bool = True
    """Gradients are reduced (and with zero parameters gathered) while the next layers compute."""
    recompute: str = "none"
    """none; selective: attention is computed again in the backward pass; full: whole layers are."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch and precision of a run."""

    engine: str = "megatron"
    """megatron: every layout. deepspeed: ZeRO 0-3 and CPU offload, with data and tensor parallel."""
    steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 32
    """Sequences in one step, over all ranks. A resumed run may change it (--allow-change) and goes on with the next
    sequence; train.steps and the schedule count steps."""
    micro_batch_size: int = 1
    """Blocks in one forward pass of one rank."""
    precision: str = "bf16"
    """bf16 (with fp32 main weights and gradients) or fp32."""
    compile: bool | None = None
    """Transformer layers through torch.compile, one graph for all; unset means on a GPU (needs a compiler there)."""
    kernels: str = "auto"
    """auto: AdamW of TransformerEngine or apex where one is installed; torch: torch's fused AdamW."""
    device: str = "auto"
    """auto, cpu or cuda; auto takes CUDA where there is a device for every local rank."""
    threads: int = 0
    """CPU threads a rank; 0 divides the cores among the ranks of this node."""
    stop_after: int = 0
    """Stop, with a checkpoint, once this step is reached; 0 goes on to `steps`."""
    max_skipped: int = 10
    """Batches in a row whose loss or gradient may be non-finite (and are skipped) before the run stops."""
    spike_width: float = 0.0
    """A loss so many robust standard deviations above the median of the last ones takes the run back to its last
    checkpoint and leaves the batches in between out (loss_guard.py; 20 is far outside of noise); 0 never goes back."""
    spike_window: int = 100
    """Steps whose losses give that median and deviation; until there are so many, nothing is a spike."""
    max_rollbacks: int = 3
    """Times the run may go back to the same checkpoint; the next spike ends it."""
    skip_batches: str = ""
    """Batches to skip, by their numbers in metrics.jsonl, such as 120-320,900."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, added to each token's loss (Chameleon: 1e-5)."""
    fp8: bool = False
    """Products of the transformer layers in 8-bit floating point, weights and all else as `precision` has them; on a
    GPU of Ada's generation or later, emulated on a CPU."""
    sample_attention: str = "auto"
    """Attention under data.attention=sample. flex: FlexAttention, no mask in memory, on a GPU without dropout; masked:
    a mask of seq_length x seq_length in each layer; auto: flex where it can be."""
    head_chunk: int = 0
    """Tokens of a micro-batch whose logits exist at once; less memory, the head's product is computed twice. 0: all."""


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """What train.engine=deepspeed does beside parallel.zero."""

    offload_optimizer: bool = False
    """Optimizer state and fp32 weights live in CPU memory and are updated there; needs parallel.zero of 1 or more."""
    offload_parameters: bool = False
    """Weights live in CPU memory and come to the device layer by layer; needs parallel.zero=3."""
    json: str = ""
    """A DeepSpeed JSON with further settings; a key that contradicts this configuration is refused."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay."""

    learning_rate: float = 6e-4
    """Peak learning rate."""
    rule: str = "none"
    """none; mm1: learning_rate and weight_decay follow from the number of parameters (MM1 section 3.3)."""
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
    """After the warm-up: linear, cosine, exponential (Chameleon), constant, or wsd (constant, then linear decay)."""
    warmup_steps: int = 1500
    """Steps of linear warm-up from 0."""
    floor: float = 0.1
    """Final learning rate as a share of the peak; exponential needs more than 0."""
    decay_steps: int = 0
    """Steps of the final decay of wsd; 0 means a tenth of train.steps."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    asynchronous: bool = True
    """Training waits only for a copy in CPU memory, which is written meanwhile; false: until all is written."""
    keep_last: int = 3
    """Newest complete checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are kept for ever; 0 is none."""
    log_spaced: bool = False
    """Also saves at steps 0 (before the first), 1, 2, 4 ... 512, and keeps those for ever (Pythia)."""


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
class ClusterConfig:
    """What watches over a run on many machines (cluster/)."""

    preflight: bool = True
    """Before the first step: devices, all-reduce, disk, clocks, and versions, configuration and data alike on all
    ranks (runtime/preflight.py)."""
    straggler_interval: int = 100
    """Steps between reports of the slowest rank; 0 never reports."""
    watchdog_seconds: float = 900.0
    """Seconds without a step, validation or save after which the run ends, with the stacks of every rank; 0: never."""
    max_restarts: int = 3
    """Restarts in a row that brought no new checkpoint before a job is no longer requeued (tools/submit.py)."""


@dataclass(kw_only=True)
class Config:
    """One run."""

    preset: str = ""
    """350m, 760m or 7b of model.family: sizes with their optimizer settings; empty for none."""
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
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def validate(self, world_size: int | None = None) -> None:
        """Fill derived values and refuse what cannot run; `world_size` in ranks, where it is known.

        Raises ValueError with the field, its value, the requirement and the remedy.
        """
        fill_family(self.model)
        check_config(self, world_size)

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that hold the same partition of the model and other data."""
        parallel = self.parallel
        return world_size // (parallel.tensor * parallel.pipeline * parallel.context)
