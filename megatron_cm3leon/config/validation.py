"""What a configuration must satisfy: bounds and choices of its fields, and layouts that can run."""

import functools
import re
from importlib.util import find_spec

from megatron_cm3leon.config.patterns import NORMS, list_selected
from megatron_cm3leon.config.schema import Config, ModelConfig
from megatron_cm3leon.config.setting import list_settings

VOCABULARY_ROW_MULTIPLE = 128
"""The model pads its vocabulary rows to a multiple of this, under every layout."""

FAMILY_ACTIVATIONS = {"cm3leon": ("relu", "gelu"), "llama": ("swiglu",)}


def fill_family(model: ModelConfig) -> None:
    """Replace unset fields by the values of the family."""
    llama = model.family == "llama"
    if not model.ffn_hidden_size:
        model.ffn_hidden_size = -(-8 * model.hidden_size // (3 * 256)) * 256 if llama else 4 * model.hidden_size
    model.activation = model.activation or FAMILY_ACTIVATIONS.get(model.family, ("",))[0]
    model.kv_heads = model.kv_heads or model.heads
    if model.tied_embeddings is None:
        model.tied_embeddings = not llama


def validate_config(config: Config, world_size: int | None = None) -> None:
    """Fill the values that follow from others, then check every rule; `world_size` in ranks, where it is known.

    Raises ValueError for the first field that breaks a rule, with its value, the requirement and the remedy.
    """
    fill_family(config.model)
    for name, setting in list_settings(Config):
        setting.check(name, _get_field(config, name))
    _check_sources(config)
    _check_validation(config)
    _check_masking(config)
    _check_family(config)
    _check_attention(config)
    _check_layout(config)
    _check_fp8(config)
    _check_engine(config)
    _check_checkpoints(config)
    parse_batches(config.train.skip_batches)
    _check_init(config)
    _check_trained_part(config)
    if world_size is not None:
        _check_installed(config)
        _check_ranks(config, world_size)


def _get_field(config: Config, path: str) -> object:
    """Value of a dotted field name, such as `model.layers`."""
    return functools.reduce(getattr, path.split("."), config)


def parse_batches(text: str) -> list[range]:
    """train.skip_batches, such as 120-320,900, as ranges in ascending order; those that touch become one."""
    found = []
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first):
            raise ValueError(f"train.skip_batches ({text}) must be numbers and ranges of batches, such as 120-320,900.")
        found.append(range(int(first), int(last) + 1))
    merged: list[range] = []
    for each in sorted(found, key=lambda each: each.start):
        if merged and each.start <= merged[-1].stop:
            each = range(merged[-1].start, max(each.stop, merged.pop().stop))
        merged.append(each)
    return merged


def _check_sources(config: Config) -> None:
    _check_mixture(config)
    if not config.data.sources:
        return
    for path in ("data.shards", "retrieval.index"):
        if value := _get_field(config, path):
            raise ValueError(
                f"{path} ({value}) must be empty with data.sources, which have their own; set only one of them."
            )
    for number, source in enumerate(config.data.sources):
        if not source.shards:
            raise ValueError(
                f"data.sources[{number}].shards is empty; give the folder that tools/preprocess_data.py wrote."
            )
        if not 0 < source.weight < float("inf"):
            raise ValueError(
                f"data.sources[{number}].weight ({source.weight}) must be above 0 and finite; remove a source that "
                f"has no share."
            )


def _check_validation(config: Config) -> None:
    names: set[str] = set()
    for number, source in enumerate(config.validation.sources):
        field = f"validation.sources[{number}]"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", source.name) or source.name == "without_retrieval":
            raise ValueError(
                f"{field}.name ({source.name!r}) must consist of letters, digits, - and _, and not be "
                f"without_retrieval; it names the losses in metrics.jsonl."
            )
        if source.name in names:
            raise ValueError(f"{field}.name ({source.name}) names another source, too; give each its own name.")
        if not source.shards:
            raise ValueError(f"{field}.shards is empty; give the folder that tools/preprocess_data.py wrote.")
        names.add(source.name)


def _check_init(config: Config) -> None:
    for name, value in (("init_step", config.train.init_step), ("positions", config.train.positions)):
        if not config.train.init and value not in (None, ""):
            raise ValueError(
                f"train.{name} ({value}) needs train.init, the weights that a new run begins with; give both, or "
                f"remove train.{name}."
            )


def _check_mixture(config: Config) -> None:
    mixture, sources = config.data.mixture, config.data.sources
    if mixture.rule == "weights":
        for number, source in enumerate(sources):
            if source.share:
                raise ValueError(
                    f"data.sources[{number}].share ({source.share}) requires data.mixture.rule=documents; it is "
                    f"weights: change it, or give data.sources[{number}].weight instead."
                )
        return
    if not sources:
        raise ValueError(
            "data.mixture.rule (documents) requires data.sources, whose shares it determines; give them, or remove it."
        )
    if not 0 < mixture.maximum_ratio >= mixture.minimum_ratio:
        raise ValueError(
            f"data.mixture.maximum_ratio ({mixture.maximum_ratio}) must be above 0 and at least "
            f"data.mixture.minimum_ratio ({mixture.minimum_ratio}); change one of them."
        )
    for number, source in enumerate(sources):
        if source.weight != 1:
            raise ValueError(
                f"data.sources[{number}].weight ({source.weight}) must be 1 with data.mixture.rule=documents, which "
                f"does not read it; give data.sources[{number}].share, or use data.mixture.rule=weights."
            )
        if not 0 <= source.share <= 1:
            raise ValueError(f"data.sources[{number}].share ({source.share}) must be between 0 and 1.")
    named = [source.share for source in sources if source.share]
    total, rest = sum(named), len(sources) - len(named)
    if named and (total >= 1 - 1e-9 if rest else abs(total - 1) > 1e-9):
        requirement = f"below 1, because {rest} sources have the rest" if rest else "1, because no source has the rest"
        raise ValueError(f"the shares of data.sources add up to {total:g}; they must add up to {requirement}.")


def _check_trained_part(config: Config) -> None:
    lora, model, only = config.lora, config.model, config.train.only
    if not lora.rank:
        for name, value, default in (("alpha", lora.alpha, 0.0), ("dropout", lora.dropout, 0.0)):
            if value != default:
                raise ValueError(f"lora.{name} ({value}) needs lora.rank, which is 0; give both, or remove it.")
    lora.alpha = lora.alpha or float(lora.rank)
    list_selected("train.only", only, model.layers)  # refuses unknown patterns
    if config.trains_part and not config.train.init:
        field = f"lora.rank ({lora.rank})" if lora.rank else f"train.only ({', '.join(only)})"
        raise ValueError(
            f"{field} needs train.init, the trained weights that are frozen or changed; give a run folder, a "
            f"checkpoint or an export."
        )
    if NORMS in {pattern.rpartition(".")[2] for pattern in only} and model.family == "cm3leon":
        raise ValueError(
            "train.only (norms) needs norms with weights, which model.family=cm3leon does not have; remove it."
        )
    if "output" in only and model.tied_embeddings:
        raise ValueError(
            "train.only (output) needs an output layer of its own, but with model.tied_embeddings it is the word "
            "embedding; use train.only=[embeddings] or train.only=[image_rows], which train both at once."
        )
    if lora.rank:
        _check_rank(config)


def _check_rank(config: Config) -> None:
    lora, model = config.lora, config.model
    if not lora.layers:
        raise ValueError("lora.layers is empty; name linear layers, such as *, or use lora.rank=0.")
    sizes = {
        "linear_qkv": min((model.heads + 2 * model.kv_heads) * (model.hidden_size // model.heads), model.hidden_size),
        "linear_proj": model.hidden_size,
        "linear_fc1": min(model.ffn_hidden_size, model.hidden_size),
        "linear_fc2": min(model.ffn_hidden_size, model.hidden_size),
    }
    for word in sorted({word for _, word in list_selected("lora.layers", lora.layers, model.layers)}):
        if lora.rank > sizes[word]:
            raise ValueError(
                f"lora.rank ({lora.rank}) must be at most {sizes[word]}, the smaller dimension of {word}; lower it."
            )


def _check_masking(config: Config) -> None:
    least, most = config.cm3.min_spans, config.cm3.max_spans
    if least > most:
        raise ValueError(f"cm3.min_spans ({least}) must be at most cm3.max_spans ({most}); change one of them.")
    rotation, infill = config.cm3.rotation_probability, config.cm3.infill_probability
    if rotation + infill > 1:
        raise ValueError(
            f"cm3.infill_probability ({infill}) and cm3.rotation_probability ({rotation}) must be at most 1 together, "
            f"because a masked sequence has one of both or random spans; lower one of them."
        )
    dropped = config.cm3.drop_documents_probability
    if dropped > 0 and config.data.packing != "query":
        raise ValueError(
            f"cm3.drop_documents_probability ({dropped}) requires data.packing=query, under which a sequence holds one "
            f"sample, not {config.data.packing}; set it to 0, or use packing=query."
        )


def _check_family(config: Config) -> None:
    model = config.model
    activations = FAMILY_ACTIVATIONS[model.family]
    if model.activation not in activations:
        raise ValueError(
            f"model.activation ({model.activation!r}) must be one of: {', '.join(activations)}, those of family "
            f"{model.family}."
        )
    if model.family == "cm3leon":
        for name, value, wanted in (
            ("kv_heads", model.kv_heads, model.heads),
            ("qk_norm", model.qk_norm, False),
            ("tied_embeddings", model.tied_embeddings, True),
            ("norm_epsilon", model.norm_epsilon, 1e-5),
        ):
            if value != wanted:
                raise ValueError(
                    f"model.{name} ({value}) must be {wanted} in family cm3leon, which is exported as OPT; remove it "
                    f"or use model.family=llama."
                )
    if model.hidden_size % model.heads:
        raise ValueError(
            f"model.hidden_size ({model.hidden_size}) must be divisible by model.heads ({model.heads}); "
            f"change one of them."
        )
    if model.heads % model.kv_heads:
        raise ValueError(
            f"model.kv_heads ({model.kv_heads}) must divide model.heads ({model.heads}); use one of "
            f"{_divisors(model.heads)}."
        )
    if model.family == "llama" and model.position_init != "normal":
        raise ValueError(
            f"model.position_init ({model.position_init}) is of learned positions, which family llama does not have; "
            f"remove it or use model.family=cm3leon."
        )
    if model.family == "llama" and model.hidden_size // model.heads % 2:
        raise ValueError(
            f"model.hidden_size ({model.hidden_size}) / model.heads ({model.heads}) must be even: RoPE rotates pairs."
        )
    if config.schedule.name == "exponential" and not config.schedule.floor:
        raise ValueError(
            "schedule.floor (0) must be above 0 with schedule.name=exponential, which never reaches 0; use for example "
            "0.01, a hundredth of the peak."
        )


def _check_attention(config: Config) -> None:
    if config.train.sample_attention != "flex":
        return
    reasons = []
    if config.model.dropout:
        reasons.append(f"model.dropout ({config.model.dropout}) to be 0, because FlexAttention has no dropout")
    if config.train.device == "cpu":
        reasons.append("a GPU (train.device is cpu), because FlexAttention has no backward pass on a CPU")
    if reasons:
        raise ValueError(
            f"train.sample_attention (flex) needs {' and '.join(reasons)}; use train.sample_attention=auto, which "
            f"uses the masked form there."
        )


def _check_fp8(config: Config) -> None:
    """fp8's kernels need sizes divisible by 16 (model/fp8.py)."""
    if not config.train.fp8:
        return
    if config.train.precision != "bf16":
        raise ValueError(
            f"train.fp8 (True) needs train.precision=bf16, whose products it replaces; it is {config.train.precision}: "
            f"use train.precision=bf16 or train.fp8=false."
        )
    model, parallel, train = config.model, config.parallel, config.train
    width = model.hidden_size // model.heads
    for name, size in (
        ("model.hidden_size", model.hidden_size),
        ("model.hidden_size / parallel.tensor", model.hidden_size // parallel.tensor),
        (
            "(model.heads + 2 x model.kv_heads) x width of a head / parallel.tensor",
            (model.heads + 2 * model.kv_heads) * width // parallel.tensor,
        ),
        ("model.ffn_hidden_size / parallel.tensor", model.ffn_hidden_size // parallel.tensor),
        (
            "train.micro_batch_size x data.seq_length / parallel.context",
            train.micro_batch_size * config.data.seq_length // parallel.context,
        ),
    ):
        if size % 16:
            raise ValueError(
                f"{name} ({size}) must be divisible by 16 with train.fp8; change one of them or use train.fp8=false."
            )


def _check_layout(config: Config) -> None:
    model, parallel, data = config.model, config.parallel, config.data
    tensor, pipeline = parallel.tensor, parallel.pipeline
    for name, value in (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % tensor:
            raise ValueError(
                f"parallel.tensor ({tensor}) must divide model.{name} ({value}); use one of {_divisors(value)}."
            )
    if VOCABULARY_ROW_MULTIPLE % tensor:
        raise ValueError(
            f"parallel.tensor ({tensor}) must divide {VOCABULARY_ROW_MULTIPLE}, to which vocabulary "
            f"rows are padded; use one of {_divisors(VOCABULARY_ROW_MULTIPLE)}."
        )
    if model.layers % pipeline:
        raise ValueError(
            f"parallel.pipeline ({pipeline}) must divide model.layers ({model.layers}); "
            f"use one of {_divisors(model.layers)}."
        )
    if parallel.interleave > 1 and pipeline == 1:
        raise ValueError(
            f"parallel.interleave ({parallel.interleave}) needs parallel.pipeline of at least 2; it is 1: use "
            f"parallel.interleave=1."
        )
    if model.layers % (pipeline * parallel.interleave):
        raise ValueError(
            f"parallel.pipeline ({pipeline}) x parallel.interleave ({parallel.interleave}) must divide model.layers "
            f"({model.layers}); use a parallel.interleave of {_divisors(model.layers // pipeline)}."
        )
    if parallel.sequence and data.seq_length % (tensor * parallel.context):
        raise ValueError(
            f"data.seq_length ({data.seq_length}) must be divisible by parallel.tensor ({tensor}) x parallel.context "
            f"({parallel.context}) with parallel.sequence; change one of them."
        )
    if parallel.context > 1 and data.seq_length % (2 * parallel.context):
        raise ValueError(
            f"data.seq_length ({data.seq_length}) must be divisible by 2 x parallel.context ({parallel.context}): each "
            f"rank holds one chunk of each half."
        )


def _check_engine(config: Config) -> None:
    parallel, offload = config.parallel, config.deepspeed
    if config.train.engine == "megatron":
        if parallel.zero > 1:
            raise ValueError(
                f"parallel.zero ({parallel.zero}) must be 0 or 1 with train.engine=megatron, which partitions only "
                f"the optimizer state; use parallel.zero=1 or train.engine=deepspeed."
            )
        for name in ("offload_optimizer", "offload_parameters", "json"):
            if value := getattr(offload, name):
                raise ValueError(
                    f"deepspeed.{name} ({value}) needs train.engine=deepspeed; remove it or use that engine."
                )
        return
    for name, wanted in (("pipeline", 1), ("interleave", 1), ("context", 1), ("sequence", False)):
        value = getattr(parallel, name)
        if value != wanted:
            raise ValueError(
                f"parallel.{name} ({value}) must be {wanted} with train.engine=deepspeed; use parallel.tensor and "
                f"parallel.zero there, or train.engine=megatron."
            )
    if config.train.compile and parallel.zero == 3:
        raise ValueError(
            "train.compile (True) needs parallel.zero of 0, 1 or 2 with train.engine=deepspeed, which gathers weights "
            "inside the layers; use parallel.zero=2 or train.compile=false."
        )
    if offload.offload_optimizer and not parallel.zero:
        raise ValueError(
            "deepspeed.offload_optimizer (True) needs parallel.zero of 1, 2 or 3; it is 0: use parallel.zero=1."
        )
    if offload.offload_parameters and parallel.zero != 3:
        raise ValueError(
            f"deepspeed.offload_parameters (True) needs parallel.zero=3, which partitions the weights; it is "
            f"{parallel.zero}."
        )


def _check_installed(config: Config) -> None:
    """Only before a run starts: reading a checkpoint of either engine needs none of its packages."""
    if config.train.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise ValueError(
            "train.engine (deepspeed) needs the package deepspeed, which is not installed; run `pip install -e "
            ".[deepspeed]` or use train.engine=megatron."
        )
    for name in config.monitoring.trackers:
        if find_spec(name) is None:
            raise ValueError(
                f"monitoring.trackers ({name}) needs the package {name}, which is not installed; run `pip install -e "
                f".[trackers]` or remove it from the list."
            )


def _check_checkpoints(config: Config) -> None:
    options = config.checkpoint
    if options.keep_every % options.interval:
        raise ValueError(
            f"checkpoint.keep_every ({options.keep_every}) must be a multiple of checkpoint.interval "
            f"({options.interval}): only saved steps can be kept; change one of them."
        )


def _check_ranks(config: Config, world_size: int) -> None:
    parallel, train = config.parallel, config.train
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % ranks:
        sizes = f"parallel.tensor ({parallel.tensor}) x parallel.pipeline ({parallel.pipeline})"
        sizes += f" x parallel.context ({parallel.context})" if parallel.context > 1 else ""
        raise ValueError(
            f"{sizes} = {ranks} must divide the number of ranks ({world_size}); start "
            f"{ranks * max(1, world_size // ranks)} ranks (torchrun --nproc-per-node) or change the layout."
        )
    sequences = train.micro_batch_size * (world_size // ranks)
    if train.global_batch_size % sequences:
        raise ValueError(
            f"train.global_batch_size ({train.global_batch_size}) must be divisible by train.micro_batch_size "
            f"({train.micro_batch_size}) x data-parallel ranks ({world_size // ranks}) = {sequences}."
        )
    if parallel.interleave > 1 and train.global_batch_size // sequences % parallel.pipeline:
        raise ValueError(
            f"train.global_batch_size ({train.global_batch_size}) gives {train.global_batch_size // sequences} "
            f"micro-batches per rank; parallel.interleave needs a multiple of parallel.pipeline ({parallel.pipeline}): "
            f"change train.global_batch_size or train.micro_batch_size."
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
