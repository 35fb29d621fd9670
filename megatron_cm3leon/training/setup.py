"""Set-up of a run: a new model, or the last complete checkpoint and what may have changed since; the loader."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_cm3leon.checkpoint.format import list_checkpoints, list_unfinished
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config, changed_fields, is_fixed
from megatron_cm3leon.data.stream.identity import compare_sources, describe_sources, identify
from megatron_cm3leon.data.stream.loader import Loader
from megatron_cm3leon.data.stream.mixture import compute_integer_weights
from megatron_cm3leon.data.stream.stream import Stream
from megatron_cm3leon.engine.base import DROPOUT_SEEDING, Engine
from megatron_cm3leon.model.memory import describe_share
from megatron_cm3leon.model.weights import canonical_shapes, count_parameters, count_trained, trained_shapes
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary
from megatron_cm3leon.training.base_model import check_resumed_init, open_base_model, open_recorded_base

logger = logging.getLogger(__name__)

_SAME_SEQUENCES = (
    "cm3.", "data.attention", "data.image_first_probability", "data.text_loss_weight", "data.image_loss_weight",
    "retrieval.loss_weight", "sft.loss",
)  # fmt: skip
"""Fields of the stream that keep every sample in its sequence."""
_LENGTHS = ("data.seq_length", "retrieval.", "sft.")
"""Fields that move samples to other sequences, except under packing=query, where sequence n is sample n."""


def latest_checkpoint(run: Path) -> Path | None:
    """Folder of the newest checkpoint, or None for a new run. Damage is detected when it is opened."""
    found = list_checkpoints(run)
    return found[-1] if found else None


def check_changes(
    reader: CheckpointReader, config: Config, stream: Stream, state: TrainState, allowed: list[str]
) -> bool:
    """Refuse to resume with another vocabulary, model or stream unless each change is in `allowed`; record the changes.

    Returns whether the stream has the same sequences as the run of the checkpoint. Raises ValueError, with the field,
    both values and the remedy, for a change that is not allowed or that no option could allow.
    """
    check_same_vocabulary(stream.vocabulary, reader.vocabulary, f"checkpoint {reader.folder}")
    found = changed_fields(reader.config, config)
    changes = {name: pair for name, pair in found.items() if is_fixed(name)}
    free = [f"{name} {old} -> {new}" for name, (old, new) in found.items() if name not in changes]
    if free:
        logger.info("changed since %s: %s", reader.folder.name, ", ".join(free))
    _check_shapes(reader, config, changes)
    for name, (before, after) in changes.items():
        if name not in allowed:
            raise ValueError(
                f"{name} ({after}) was {before} in {reader.folder}; resume with the old value, start a new run folder "
                f"(output=...), or confirm the change with --allow-change {name}."
            )
    difference, field = _compare_sources(reader, config, stream, state)
    if difference and not {field, "data.shards"} & set(allowed):
        raise ValueError(
            f"{difference}; use the same data, start a new run folder (output=...), or confirm the change with "
            f"--allow-change {field}."
        )
    if difference:
        changes[field] = state.stream, stream.identity
    for name, (before, after) in changes.items():
        state.changes.append({"step": state.step, "batch": state.batch, "field": name, "old": before, "new": after})
    _log_position(reader.config, config, changes, state)
    return not any(name.startswith(("seed", "data.", "retrieval.", "cm3.")) for name in changes)


def _check_shapes(reader: CheckpointReader, config: Config, changes: dict[str, tuple]) -> None:
    """Refuse a change after which the parameters have other shapes: --allow-change could not load the checkpoint."""
    size = reader.vocabulary.size

    def list_shapes(config: Config) -> tuple:
        return canonical_shapes(config, size), trained_shapes(config, size)

    before = list_shapes(reader.config)
    if list_shapes(config) == before:
        return
    for name, (old, new) in changes.items():
        alone, (section, _, field) = copy.deepcopy(reader.config), name.rpartition(".")
        setattr(getattr(alone, section) if section else alone, field, new)
        if list_shapes(alone) != before:
            reason = "which changes the shapes of the parameters"
            if name in ("train.only", "lora.layers", "lora.rank"):
                reason = "which changes what is trained and saved"
            if name == "data.seq_length":
                reason = f"which has {old} learned positions (model.family=cm3leon), one for each token of a sequence"
            raise ValueError(
                f"{name} ({new}) was {old} in {reader.folder}, {reason}; resume with {name}={old}, or start a new run "
                f"folder (output=...)."
            )


def _compare_sources(reader: CheckpointReader, config: Config, stream: Stream, state: TrainState) -> tuple[str, str]:
    """How the data of the stream differ from the checkpoint's, and the field that names them; ("", "") if equal."""
    old, present = reader.config, describe_sources(stream.samples, reader.config)
    if state.stream_parts:
        return compare_sources(state.stream_parts, present, config, reader.folder)
    # Version 1 of the identity, which is only a hash.
    if old.retrieval.documents and not config.retrieval.documents:
        return "", ""  # the identity covers an index that is no longer open
    if identify(present, old, version=1) == state.stream:
        return "", ""
    weighted = present | {"weights": compute_integer_weights([source.weight for source in old.data.sources] or [1.0])}
    if identify(weighted, old, version=1) == state.stream:
        return compare_sources(weighted, present, config, reader.folder)
    field = "data.sources" if config.data.sources else "data.shards"
    return f"the shards or the index of this run are not those of {reader.folder}", field


def _log_position(old: Config, config: Config, changes: dict[str, tuple], state: TrainState) -> None:
    """Log where in the stream a run continues whose batches or sequences have changed."""
    moving = [
        name
        for name in changes
        if not name.startswith(("model.", "train.", *_SAME_SEQUENCES))
        and not (name.startswith(_LENGTHS) and old.data.packing == config.data.packing == "query")
    ]
    if moving:
        logger.info(
            "training continues at sequence %d, which is another position in the data because %s changed: some samples "
            "are repeated or skipped in this epoch",
            state.sequence, " and ".join(moving),
        )  # fmt: skip
    elif "train.global_batch_size" in changes:
        logger.info(
            "training continues at sequence %d with batches of %d sequences instead of %d: no sample is skipped or "
            "repeated; train.steps and the schedule count steps as before",
            state.sequence, *reversed(changes["train.global_batch_size"]),
        )  # fmt: skip


def check_dropout_seeding(folder: Path, config: Config, state: TrainState) -> None:
    """Log that an older run keeps the dropout seeding it started with; ValueError for an unknown version."""
    if not config.uses_dropout:
        return
    if state.dropout_seeding > DROPOUT_SEEDING:
        raise ValueError(
            f"dropout_seeding ({state.dropout_seeding}) in {folder / 'state.json'} must be at most {DROPOUT_SEEDING}, "
            f"the newest version that this program knows; resume with the program version that started the run."
        )
    if state.dropout_seeding < DROPOUT_SEEDING:
        logger.info(
            "dropout masks keep the seeding of the start of this run (version %d: pipeline and context-parallel ranks "
            "draw the same masks); a new run folder (output=...) has version %d",
            state.dropout_seeding,
            DROPOUT_SEEDING,
        )


def engine_class(config: Config) -> Callable[[Config, Vocabulary, torch.device], Engine]:
    """The class that `train.engine` names; the packages of the other engine are not imported."""
    if config.train.engine == "deepspeed":
        from megatron_cm3leon.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine
    from megatron_cm3leon.engine.megatron import MegatronEngine

    return MegatronEngine


def open_run(
    config: Config, stream: Stream, device: torch.device, allowed: list[str]
) -> tuple[Engine, TrainState, Path | None]:
    """Build the engine and load the last checkpoint: engine, state, and the checkpoint's folder (None for a new run).

    A new run begins with the weights of train.init, or with new ones.

    `allowed`: fields of the model or the stream that may differ from the checkpoint's. Changes are checked before
    weights are read; raises ValueError as check_changes, check_resumed_init and open_base_model do.
    """
    build_engine = engine_class(config)
    folder = latest_checkpoint(Path(config.output))
    if folder is None:
        base = open_base_model(config, stream.vocabulary) if config.train.init else None
        _log_trained_part(config, stream.vocabulary)
        engine = build_engine(config, stream.vocabulary, device)
        state = TrainState(dropout_seeding=engine.dropout_seeding)
        if base:
            engine.load_weights(base)
            state.init = base.describe(base.weights.hash_content())
            logger.info("began with %s", base.describe_start())
        return engine, _record_stream(state, stream), None
    reader = CheckpointReader(folder)
    state = reader.state
    check_resumed_init(config, state, folder)
    if check_changes(reader, config, stream, state, allowed):
        stream.resume(state.cursor)
    check_dropout_seeding(reader.folder, config, state)
    base = open_recorded_base(config, stream.vocabulary, state, folder) if config.trains_part else None
    _log_trained_part(config, stream.vocabulary)
    engine = build_engine(config, stream.vocabulary, device)
    if base:
        engine.load_weights(base)
    engine.load(folder)
    logger.info("resumed from %s at step %d", folder, state.step)
    for left in list_unfinished(Path(config.output)):
        logger.info("%s is incomplete, because the run ended before it was written; it is not used", left)
    return engine, _record_stream(state, stream), folder


def _log_trained_part(config: Config, vocabulary: Vocabulary) -> None:
    if config.trains_part:
        total, trained = (
            count_parameters(config, vocabulary.size),
            count_trained(config, vocabulary.size, vocabulary.image_size),
        )
        logger.info("training %s", describe_share(config, trained, total))


def _record_stream(state: TrainState, stream: Stream) -> TrainState:
    """The state, with the identity of `stream` recorded in it."""
    state.stream, state.stream_parts = stream.identity, describe_sources(stream.samples, stream.config)
    return state


def build_loader(config: Config, stream: Stream, engine: Engine, state: TrainState) -> Loader:
    """The loader of this rank's part of each batch, from the position of `state` on."""
    return Loader(
        stream,
        rank=engine.data_rank,
        size=engine.data_size,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        start_batch=state.batch,
        start_sequence=state.sequence,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=engine.device.type == "cuda",
    )
