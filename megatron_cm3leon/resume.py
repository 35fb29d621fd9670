"""Where a run begins: a new model, or the last complete checkpoint and what may have changed since."""

import logging
from pathlib import Path

import torch

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config import FIXED_FIELDS, Config, changed_fields
from megatron_cm3leon.data.stream import Stream
from megatron_cm3leon.engine.base import DROPOUT_SEEDING, Engine
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

logger = logging.getLogger(__name__)


def latest_checkpoint(run: Path) -> Path | None:
    """Folder of the newest checkpoint, or None at the start of a run. A damaged one is refused when it is opened."""
    found = sharded.list_checkpoints(run)
    return found[-1] if found else None


def check_changes(
    reader: sharded.CheckpointReader, config: Config, stream: Stream, state: TrainState, allowed: list[str]
) -> None:
    """Refuse to resume with another vocabulary, model or stream unless each changed field was allowed; record those."""
    check_same_vocabulary(stream.vocabulary, reader.vocabulary, f"checkpoint {reader.folder}")
    found = changed_fields(reader.config, config)
    changes = {name: pair for name, pair in found.items() if name.startswith(FIXED_FIELDS)}
    free = [f"{name} {old} -> {new}" for name, (old, new) in found.items() if name not in changes]
    if free:
        logger.info("changed since %s: %s", reader.folder.name, ", ".join(free))
    for name, (before, after) in changes.items():
        if name not in allowed:
            raise ValueError(
                f"{name} ({after}) was {before} in {reader.folder}; resume with the old value, start a new run folder "
                f"(output=...), or confirm with --allow-change {name}."
            )
        state.changes.append({"step": state.step, "field": name, "old": before, "new": after})
    if state.stream != stream.fingerprint and not changes and "data.shards" not in allowed:
        raise ValueError(
            f"the shards or the index behind this run, or the weights of data.sources, are not those of "
            f"{reader.folder}; give the same ones, start a new run folder (output=...), or confirm with "
            f"--allow-change data.shards."
        )


def check_dropout_seeding(folder: Path, config: Config, state: TrainState) -> None:
    """Log that an older run keeps the seeding of dropout that it began with; ValueError for a newer one than ours."""
    if not config.model.dropout:
        return
    if state.dropout_seeding > DROPOUT_SEEDING:
        raise ValueError(
            f"dropout_seeding ({state.dropout_seeding}) in {folder / 'state.json'} must be at most {DROPOUT_SEEDING}, "
            f"the newest that this version of the program knows; resume with the version that began the run."
        )
    if state.dropout_seeding < DROPOUT_SEEDING:
        logger.info(
            "dropout masks keep the seeding that this run began with (version %d: pipeline and context-parallel ranks "
            "draw the same masks); a new run folder (output=...) has version %d",
            state.dropout_seeding,
            DROPOUT_SEEDING,
        )


def engine_class(config: Config) -> type[Engine]:
    """The class of `train.engine`; the other one's packages are not imported."""
    if config.train.engine == "deepspeed":
        from megatron_cm3leon.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine
    from megatron_cm3leon.engine.megatron import MegatronEngine

    return MegatronEngine


def open_run(
    config: Config, stream: Stream, device: torch.device, allowed: list[str]
) -> tuple[Engine, TrainState, Path | None]:
    """Engine and state to go on from, the last checkpoint's (its folder comes third) or new.

    Changed fields are told before weights are read.
    """
    build_engine = engine_class(config)
    folder = latest_checkpoint(Path(config.output))
    if folder is None:
        engine = build_engine(config, stream.vocabulary, device)
        return engine, TrainState(stream=stream.fingerprint, dropout_seeding=engine.dropout_seeding), None
    reader = sharded.CheckpointReader(folder)
    state = reader.state
    check_changes(reader, config, stream, state, allowed)
    check_dropout_seeding(reader.folder, config, state)
    engine = build_engine(config, stream.vocabulary, device)
    engine.load(folder)
    if state.stream == stream.fingerprint:
        stream.resume(state.cursor)
    state.stream = stream.fingerprint
    logger.info("resumed from %s at step %d", folder, state.step)
    for left in sharded.list_unfinished(Path(config.output)):
        logger.info("%s was not finished when the run ended; it is not used", left)
    return engine, state, folder
