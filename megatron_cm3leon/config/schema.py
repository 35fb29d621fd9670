"""Every field of the configuration: default, bounds, resume policy and description; one dataclass per section.

loading.py reads them from YAML and the command line, validation.py checks them and fills derived values.
"""

from dataclasses import dataclass, field

from megatron_cm3leon.config.setting import Setting, setting


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the decoder-only transformer (CM3Leon section 2.3, table 3)."""

    family: str = setting("cm3leon", choices=("cm3leon", "llama"), resume="fixed")
    """cm3leon: pre-LayerNorm without parameters, no bias, learned positions. llama: RMSNorm, RoPE, SwiGLU."""
    layers: int = setting(24, minimum=1, resume="fixed")
    """Transformer layers."""
    hidden_size: int = setting(1024, minimum=1, resume="fixed")
    """Width of the residual stream."""
    heads: int = setting(16, minimum=1, resume="fixed")
    """Attention heads; must divide hidden_size."""
    kv_heads: int = setting(0, minimum=0, resume="fixed")
    """Heads of keys and values (llama: grouped-query attention); 0: as many as `heads`."""
    ffn_hidden_size: int = setting(0, resume="fixed")
    """Width of the feed-forward layer; 0: 4 x hidden_size, or for llama 8/3 x hidden_size, rounded up to 256s."""
    activation: str = setting("", resume="fixed")
    """cm3leon: relu (OPT's) or gelu (the exact, erf form); llama: swiglu. Empty: the first of the family."""
    qk_norm: bool = setting(False, resume="fixed")
    """RMSNorm of queries and keys, one scale per head dimension (llama; Chameleon's QK-norm in Qwen3's form)."""
    rope_base: float = setting(10000.0, minimum=1, resume="fixed")
    """Base of the wavelengths of RoPE (llama)."""
    norm_epsilon: float = setting(1e-5, minimum=0, resume="fixed")
    """Added to the variance in every norm."""
    tied_embeddings: bool | None = setting(None, resume="fixed")
    """Whether the output layer uses the weights of the word embedding; unset: cm3leon yes, llama no."""
    init_std: float = setting(0.006, minimum=0, resume="fixed")
    """Standard deviation of the initial weights: a normal distribution, truncated at 3 standard deviations."""
    position_init: str = setting("normal", choices=("normal", "sinusoidal"), resume="fixed")
    """Initial position embeddings (cm3leon), which are learned. normal: random (CM3Leon); sinusoidal: sines and cosines
    of the position, from which attention to a relative position is learned sooner."""
    position_init_std: float = setting(0.0002, minimum=0, resume="fixed")
    """Standard deviation of the initial position embeddings; with sinusoidal, their root mean square."""
    dropout: float = setting(0.0, minimum=0, maximum=0.99, resume="fixed")
    """Dropout probability of embeddings, attention and residual branches (CM3Leon: none)."""


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture."""

    shards: str = setting("", path=True)
    """Folder of shards that tools/preprocess_data.py wrote."""
    weight: float = setting(1.0)
    """Share of the samples relative to the other sources: 0.7, 0.2, 0.1 give the same mixture as 7, 2, 1."""
    index: str = setting("", path=True)
    """Index folder that tools/build_index.py wrote for these shards; empty: this source has no retrieved documents."""
    share: float = setting(0.0, minimum=0, maximum=1)
    """With data.mixture.rule=documents: the share of all samples; 0: the rule decides."""


@dataclass(kw_only=True)
class MixtureConfig:
    """How the shares of data.sources follow from their numbers of documents (data/stream/mixture.py)."""

    rule: str = setting("weights", choices=("weights", "documents"), resume="content")
    """weights: the shares are data.sources[].weight. documents: the share of a source is proportional to min(documents,
    cap)^alpha, or its data.sources[].share, and is then limited by the two ratios below."""
    alpha: float = setting(1.0, minimum=0, maximum=10, resume="content")
    """Exponent: 1 in proportion to the documents, 0 equal shares."""
    cap: int = setting(0, minimum=0, resume="content")
    """Documents of a source that count at most; 0: all."""
    minimum_ratio: float = setting(0.3, minimum=0, resume="content")
    """Smallest number of samples of a source per mixture epoch, as a share of its documents (CM3Leon: 0.3)."""
    maximum_ratio: float = setting(3.0, minimum=0, resume="content")
    """Largest such number: no source is repeated more often per mixture epoch (CM3Leon: 3)."""


@dataclass(kw_only=True)
class DataConfig:
    """The shards, and how their documents become sequences of seq_length + 1 tokens."""

    shards: str = setting("", resume="content", path=True)
    """Folder of shards that tools/preprocess_data.py wrote."""
    sources: list[SourceConfig] = field(default_factory=list, metadata={"setting": Setting(resume="content")})
    """Several sources with weights, instead of `shards` and retrieval.index."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How the shares of `sources` are determined."""
    seq_length: int = setting(4096, minimum=8, resume="fixed")
    """Tokens per sequence; also the number of learned positions (cm3leon), which a resumed run cannot change."""
    packing: str = setting("query", choices=("query", "stream", "stream_whole_images", "documents"), resume="fixed")
    """query: one sequence per query document, which is never cut and comes last. stream: samples are concatenated and
    cut into sequences. stream_whole_images: as stream, but no sequence begins inside an image. documents: whole
    samples, packed by best fit."""
    attention: str = setting("causal", choices=("causal", "sample"), resume="fixed")
    """causal: a token attends to all earlier tokens of its sequence; sample: only to those of the same sample."""
    image_first_probability: float = setting(0.5, minimum=0, maximum=1, resume="fixed")
    """Probability, per document and epoch, that the image of a pair comes before its text. Documents with targets keep
    their order."""
    text_loss_weight: float = setting(1.0, minimum=0, resume="fixed")
    """Factor of the loss weight of text tokens."""
    image_loss_weight: float = setting(1.0, minimum=0, resume="fixed")
    """Factor of the loss weight of image tokens."""
    workers: int = setting(1, minimum=0)
    """Loader processes per rank; 0: batches are loaded in the training process."""
    prefetch: int = setting(4, minimum=1)
    """Batches that each loader process prepares in advance."""


@dataclass(kw_only=True)
class RetrievalConfig:
    """Retrieved documents before the query document (CM3Leon section 2.1)."""

    index: str = setting("", resume="content", path=True)
    """Index folder that tools/build_index.py wrote; empty: training without retrieval."""
    documents: int = setting(3, minimum=0, resume="fixed")
    """Retrieved documents before each query document."""
    choice: str = setting("fixed", choices=("fixed", "uniform"), resume="fixed")
    """Number of retrieved documents. fixed: always `documents` (CM3Leon); uniform: 0 to `documents`, equally likely
    (RA-CM3)."""
    loss_weight: float = setting(1.0, minimum=0, resume="fixed")
    """Weight of the loss on retrieved documents (RA-CM3's alpha, 0.1 there; CM3Leon: 1)."""


@dataclass(kw_only=True)
class CM3Config:
    """Causal masking: spans move to the end of the sequence (CM3Leon section 2.2)."""

    probability: float = setting(1.0, minimum=0, maximum=1, resume="fixed")
    """Probability that a sequence is masked; 0: plain autoregressive training."""
    mean_spans: float = setting(1.0, minimum=0, resume="fixed")
    """Mean of the Poisson distribution of the number of spans."""
    min_spans: int = setting(0, minimum=0, resume="fixed")
    """Smallest number of spans in a masked sequence (CM3Leon: 0; CM3 and InCoder: 1)."""
    max_spans: int = setting(511, minimum=0, resume="fixed")
    """Largest number of spans in a sequence (CM3Leon: 511; CM3: 16; InCoder: 256)."""
    sentinel_loss_weight: float = setting(1.0, minimum=0, resume="fixed")
    """Factor of the loss weight of sentinels (CM3Leon: 1; CM3: 0)."""
    rotation_probability: float = setting(0.0, minimum=0, maximum=1, resume="fixed")
    """Probability that one complete segment of a masked sequence is moved, instead of random spans."""
    infill_probability: float = setting(0.0, minimum=0, maximum=1, resume="fixed")
    """Probability that a part of one text, or a box of one image, of a masked sequence is moved, instead of random
    spans: the prompts of infilling. At most 1 together with rotation_probability."""
    drop_documents_probability: float = setting(0.0, minimum=0, maximum=1, resume="fixed")
    """Probability that a masked sequence has no retrieved documents: masked prompts without retrieval. Above 0 requires
    data.packing=query."""


@dataclass(kw_only=True)
class SFTConfig:
    """Instruction tuning: what concerns documents with targets (CM3Leon section 3.1 and appendix E).

    Documents without targets, which are pre-training data, do not depend on this section, except in sequences that
    are mixed with others (`loss`).
    """

    loss: str = setting("all", choices=("all", "target"), resume="fixed")
    """all: every token of a document has a loss, as in pre-training. target: only its targets, and the token after each
    target, which says that it ends; no sample has a loss on its first </s>. Retrieved documents have
    retrieval.loss_weight under both."""
    mask_targets: float = setting(1.0, minimum=0, maximum=1, resume="fixed")
    """Probability, per document and epoch, that its targets that are not at its end are placed after the sample's last
    </s>, each after its own sentinel, as in the paper; 0: they stay where they are."""
    drop_condition_probability: float = setting(0.0, minimum=0, maximum=1, resume="fixed")
    """Probability, per document and epoch, that everything before an image is replaced by one sentinel, if that image
    is the document's first target: the unconditional form that guidance uses in generation."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Layout over the ranks; data-parallel size = ranks / (tensor x pipeline x context)."""

    tensor: int = setting(1, minimum=1)
    """Tensor-parallel ranks, over which the matrices of each layer are partitioned; must divide model.heads and
    model.kv_heads."""
    pipeline: int = setting(1, minimum=1)
    """Pipeline stages; must divide model.layers."""
    interleave: int = setting(1, minimum=1)
    """Chunks of layers per pipeline stage (interleaved schedule: less idle time); more than 1 needs pipeline of at
    least 2."""
    sequence: bool = setting(False)
    """Sequence parallelism: each tensor-parallel rank computes norms and dropout for a part of the sequence."""
    context: int = setting(1, minimum=1)
    """Context-parallel ranks, over which each sequence is divided, in attention too; 2 x context must divide
    data.seq_length."""
    zero: int = setting(0, choices=(0, 1, 2, 3))
    """ZeRO stage, what is partitioned over data-parallel ranks: 1 optimizer state; with train.engine=deepspeed also 2
    (and gradients) and 3 (and weights)."""
    overlap: bool = setting(True)
    """Whether gradients are reduced (with zero also parameters gathered) while other layers compute."""
    recompute: str = setting("none", choices=("none", "selective", "full"))
    """Activations that are recomputed in the backward pass: none; selective: those of attention; full: all."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch and precision of a run."""

    engine: str = setting("megatron", choices=("megatron", "deepspeed"))
    """megatron: every layout. deepspeed: ZeRO 0-3 and CPU offload, with data and tensor parallelism."""
    steps: int = setting(1000, minimum=1)
    """Optimizer steps."""
    init: str = setting("", path=True)
    """Begin a new run with the weights of a run folder (its newest checkpoint), a checkpoint folder or an export of the
    same model and vocabulary, under any layout; step 0, no optimizer state, data from the start. Empty: new weights. A
    run that resumes does not read it again."""
    init_step: int | None = setting(None)
    """Step of the checkpoint of the run folder train.init; unset: the newest."""
    positions: str = setting("", choices=("", "extend", "interpolate"))
    """Learned positions (cm3leon) where data.seq_length is larger than that of train.init. extend: its rows stay,
    further rows are new weights. interpolate: its table is stretched linearly, the first and the last row stay. Empty:
    a larger length is refused. A smaller length keeps the first rows, whatever this says."""
    only: list[str] = field(default_factory=list, metadata={"setting": Setting(resume="fixed")})
    """Train these parts of train.init and freeze all others: embeddings, image_rows, output, norms, and layers by
    pattern (config/patterns.py), such as layers.0-11 or layers.3.mlp. Empty: everything, or with lora.rank the adapters
    alone. image_rows: rows of the image codes in word embedding and output layer."""
    global_batch_size: int = setting(32, minimum=1, resume="fixed")
    """Sequences per step, over all ranks. A resumed run that changes it (--allow-change) continues with the next
    sequence; train.steps and the schedule count steps."""
    micro_batch_size: int = setting(1, minimum=1)
    """Sequences per forward pass of one rank."""
    precision: str = setting("bf16", choices=("bf16", "fp32"))
    """bf16 (with weights of the optimizer and gradients in fp32) or fp32."""
    compile: bool | None = setting(None)
    """Compile the transformer layers by torch.compile, one graph for all; unset: on a GPU only (a C compiler must be
    installed)."""
    kernels: str = setting("auto", choices=("auto", "torch"))
    """auto: AdamW of TransformerEngine or apex where one is installed; torch: the fused AdamW of torch."""
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    """auto, cpu or cuda; auto: CUDA where there is a device for each rank of the node."""
    threads: int = setting(0, minimum=0)
    """CPU threads per rank; 0: the cores of the node divided by its ranks."""
    stop_after: int = setting(0, minimum=0)
    """Save a checkpoint and stop after this step; 0: after `steps`."""
    max_skipped: int = setting(10, minimum=0)
    """Batches with a non-finite loss or gradient are skipped; the run stops after more than this many in a row."""
    spike_width: float = setting(0.0, minimum=0)
    """Roll back to the last checkpoint and skip the batches since it when the loss exceeds the median of the last steps
    by this many robust standard deviations (training/spikes.py; 20 is far outside of noise); 0: never."""
    spike_window: int = setting(100, minimum=3)
    """Number of last steps for that median and deviation; no spike is detected before there are so many."""
    max_rollbacks: int = setting(3, minimum=0)
    """Rollbacks to the same checkpoint; the next spike after them stops the run."""
    skip_batches: str = setting("")
    """Numbers of the batches to skip, as in metrics.jsonl, such as 120-320,900."""
    z_loss: float = setting(0.0, minimum=0)
    """Weight of the z-loss, the squared logarithm of the softmax denominator, added to the loss of each token
    (Chameleon: 1e-5)."""
    fp8: bool = setting(False)
    """Matrix products of the transformer layers in 8-bit floating point; everything else as in `precision`. Needs a GPU
    of compute capability 8.9 or later; emulated on a CPU."""
    sample_attention: str = setting("auto", choices=("auto", "flex", "masked"))
    """Attention with data.attention=sample. flex: FlexAttention without a mask in memory, on a GPU and without dropout;
    masked: a mask of seq_length x seq_length per layer; auto: flex where it is possible."""
    head_chunk: int = setting(0, minimum=0)
    """Tokens of a micro-batch whose logits are in memory at the same time: less memory, but the product of the output
    layer is computed twice. 0: all."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) of the linear layers of train.init, which is frozen but for train.only."""

    rank: int = setting(0, minimum=0, resume="fixed")
    """Columns of B and rows of A, whose product is added to a weight: W + alpha / rank x B A. 0: no adapters."""
    alpha: float = setting(0.0, minimum=0, resume="fixed")
    """Numerator of the factor of B A; 0: as large as `rank`, a factor of 1."""
    dropout: float = setting(0.0, minimum=0, maximum=0.99, resume="fixed")
    """Dropout probability of the adapters' inputs."""
    layers: list[str] = field(default_factory=lambda: ["*"], metadata={"setting": Setting(resume="fixed")})
    """Linear layers with an adapter (config/patterns.py): *, attention, mlp, linear_qkv, linear_proj, linear_fc1,
    linear_fc2, each also for some layers only, as in layers.0-11 or layers.3.attention."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """Options of train.engine=deepspeed other than parallel.zero."""

    offload_optimizer: bool = setting(False)
    """Keep optimizer state and fp32 weights in CPU memory and update them there; needs parallel.zero of 1 or more."""
    offload_parameters: bool = setting(False)
    """Keep weights in CPU memory and copy them to the device layer by layer; needs parallel.zero=3."""
    json: str = setting("", path=True)
    """DeepSpeed JSON file with further settings; a key that contradicts this configuration is refused."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay."""

    learning_rate: float = setting(6e-4, minimum=0)
    """Peak learning rate."""
    rule: str = setting("none", choices=("none", "mm1"))
    """none; mm1: compute learning_rate and weight_decay from the number of parameters (MM1 section 3.3)."""
    beta1: float = setting(0.9, minimum=0, maximum=1)
    """Decay rate of the mean of gradients."""
    beta2: float = setting(0.95, minimum=0, maximum=1)
    """Decay rate of the mean of squared gradients."""
    epsilon: float = setting(1e-8, minimum=0)
    """Added to the denominator of the update."""
    weight_decay: float = setting(0.1, minimum=0)
    """Decoupled weight decay of matrices; vectors have none."""
    clip: float = setting(1.0, minimum=0)
    """Largest global gradient norm; 0: no clipping."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    name: str = setting("linear", choices=("linear", "cosine", "exponential", "constant", "wsd"))
    """After the warm-up: linear, cosine, exponential (Chameleon), constant, or wsd (constant, then linear decay)."""
    warmup_steps: int = setting(1500, minimum=0)
    """Steps of linear warm-up from 0."""
    floor: float = setting(0.1, minimum=0, maximum=1)
    """Final learning rate as a share of the peak; exponential requires more than 0."""
    decay_steps: int = setting(0, minimum=0)
    """Steps of the final decay of wsd; 0: a tenth of train.steps."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    interval: int = setting(1000, minimum=1)
    """Steps between checkpoints; the last step is always saved."""
    asynchronous: bool = setting(True)
    """true: training continues once the state is copied to CPU memory, and the copy is written in the background;
    false: training waits until the checkpoint is written."""
    keep_last: int = setting(3, minimum=0)
    """Number of newest complete checkpoints that are kept; 0: all."""
    keep_every: int = setting(0, minimum=0)
    """Checkpoints of steps divisible by this are never deleted; 0: none."""
    log_spaced: bool = setting(False)
    """Also save at steps 0 (before the first), 1, 2, 4 ... 512, and never delete those (Pythia)."""


@dataclass(kw_only=True)
class ValidationSource:
    """Held-out documents whose losses are reported under a name of their own, such as those of a task."""

    name: str = setting("")
    """Letters, digits, - and _; metrics.jsonl has validation_NAME_loss, validation_NAME_loss_text and _image."""
    shards: str = setting("", path=True)
    """Folder of held-out shards."""
    index: str = setting("", path=True)
    """Index folder of these shards; empty: no retrieved documents."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Loss on held-out documents while training."""

    shards: str = setting("", path=True)
    """Folder of held-out shards; empty: only those of `sources`."""
    index: str = setting("", path=True)
    """Index folder of the held-out shards; its retrieved documents come from the training set."""
    sources: list[ValidationSource] = field(default_factory=list, metadata={"setting": Setting()})
    """Further held-out shards with a name each, whose losses are reported one by one."""
    interval: int = setting(0, minimum=0)
    """Steps between validations; 0: never."""
    batches: int = setting(4, minimum=1)
    """Global batches per validation, the same ones each time."""


@dataclass(kw_only=True)
class ClusterConfig:
    """Monitoring of a run on many machines (runtime/), and its restarts (slurm/)."""

    preflight: bool = setting(True)
    """Before the first step, check devices, all-reduce, disk and clocks, and that versions, configuration and data are
    the same on all ranks (runtime/preflight.py)."""
    straggler_interval: int = setting(100, minimum=0)
    """Steps between reports of the slowest rank; 0: never."""
    watchdog_seconds: float = setting(900.0, minimum=0)
    """Seconds without a step, validation or save after which the run stops and the stack of every rank is printed; 0:
    never."""
    max_restarts: int = setting(3, minimum=0)
    """Stop requeueing a job after this many consecutive restarts without a new checkpoint (tools/submit.py)."""


@dataclass(kw_only=True)
class MonitoringConfig:
    """Where the metrics of a run go beside metrics.jsonl."""

    trackers: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"setting": Setting(choices=("tensorboard", "wandb", "mlflow"))},
    )
    """Any of tensorboard, wandb and mlflow (monitoring/trackers.py); [] for none."""


@dataclass(kw_only=True)
class Config:
    """Configuration of one run."""

    preset: str = setting("")
    """350m, 760m or 7b: sizes and optimizer settings of model.family; sft-760m or sft-7b: those of the second stage
    (train.init); empty: none."""
    output: str = setting("runs/train", path=True)
    """Run folder."""
    seed: int = setting(1234, resume="fixed")
    """Seed of the initial weights, the stream and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    cm3: CM3Config = field(default_factory=CM3Config)
    sft: SFTConfig = field(default_factory=SFTConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks of `world_size` ranks."""
        parallel = self.parallel
        return world_size // (parallel.tensor * parallel.pipeline * parallel.context)

    @property
    def trains_part(self) -> bool:
        """Whether a part of the model is frozen: its checkpoints hold what is trained and name the base, train.init."""
        return bool(self.lora.rank or self.train.only)

    @property
    def uses_dropout(self) -> bool:
        """Whether a training step draws random numbers."""
        return bool(self.model.dropout or (self.lora.rank and self.lora.dropout))
