"""Train a model: `torchrun --nproc-per-node 4 -m megatron_cm3leon.train config.yaml section.key=value ...`

Starting the same command again resumes from the last complete checkpoint of the run folder.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.schedule import RunSaver
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.cli import show_messages
from megatron_cm3leon.cluster.events import record
from megatron_cm3leon.cluster.preflight import check_all_reduce, compare_ranks
from megatron_cm3leon.cluster.stragglers import StragglerWatch
from megatron_cm3leon.config import FIXED_FIELDS, Config, changed_fields, load_config, save_config
from megatron_cm3leon.data.history import NON_FINITE
from megatron_cm3leon.data.loader import Loader
from megatron_cm3leon.data.shards import open_shards
from megatron_cm3leon.data.stream import Stream, build_stream
from megatron_cm3leon.engine.base import Engine, StepMetrics
from megatron_cm3leon.engine.parallel import (
    Rank,
    choose_device,
    destroy_groups,
    gather_objects,
    initialize_groups,
    is_first_to_fail,
    meet,
    set_threads,
)
from megatron_cm3leon.loss_guard import LossGuard, leave_out
from megatron_cm3leon.metrics import MetricsLogger, plain
from megatron_cm3leon.model.weights import count_parameters
from megatron_cm3leon.plan import PAPER_VOCABULARY, describe
from megatron_cm3leon.progress import meter
from megatron_cm3leon.schedule import follow_rule, learning_rate
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

logger = logging.getLogger("megatron_cm3leon.train")  # by name: this module also runs as __main__

SECONDS_FOR_FIRST_RANK = 20
"""A launcher ends all ranks with the first that ends: the others wait, so that the first rank's sentence is printed."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron_cm3leon.train", description=__doc__)
    parser.add_argument("config", help="YAML file of the run; megatron_cm3leon/config_fields.py documents every field")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that replace the YAML's")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="field of the model or the stream that a resumed run may change, such as cm3.probability; repeatable",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print ranks, groups, parameters and bytes a rank; start nothing"
    )
    parser.add_argument("--ranks", type=int, default=0, help="ranks of a dry run (default: those that were launched)")
    return parser.parse_args(arguments)


def dry_run(config: Config, ranks: int) -> str:
    """What the run would need on `ranks` ranks; ValueError where the layout cannot be built."""
    config.validate(ranks)
    folder = config.data.sources[0].shards if config.data.sources else config.data.shards
    size = open_shards(folder).vocabulary.size if folder else PAPER_VOCABULARY
    follow_rule(config, count_parameters(config, size))
    return describe(config, size, ranks)


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


def engine_class(config: Config) -> type[Engine]:
    """The class of `train.engine`; the other one's packages are not imported."""
    if config.train.engine == "deepspeed":
        from megatron_cm3leon.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine
    from megatron_cm3leon.engine.megatron import MegatronEngine

    return MegatronEngine


def open_run(config: Config, stream: Stream, device, allowed: list[str]) -> tuple[Engine, TrainState]:
    """Engine and state to go on from, the last checkpoint's or new. Changed fields are told before weights are read."""
    build_engine = engine_class(config)
    folder = latest_checkpoint(Path(config.output))
    if folder is None:
        return build_engine(config, stream.vocabulary, device), TrainState(stream=stream.fingerprint, attempt=1)
    reader = sharded.CheckpointReader(folder)
    state = reader.state
    check_changes(reader, config, stream, state, allowed)
    engine = build_engine(config, stream.vocabulary, device)
    engine.load(folder)
    if state.stream == stream.fingerprint:
        stream.resume(state.cursor)
    state.stream = stream.fingerprint
    state.attempt += 1
    logger.info("resumed from %s at step %d", folder, state.step)
    for left in sharded.list_unfinished(Path(config.output)):
        logger.info("%s was not finished when the run ended; it is not used", left)
    return engine, state


def build_loader(config: Config, stream: Stream, engine: Engine, start_batch: int) -> Loader:
    return Loader(
        stream,
        rank=engine.data_rank,
        size=engine.data_size,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        start_batch=start_batch,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=engine.device.type == "cuda",
    )


def restart_loader(loader: Loader, config: Config, stream: Stream, engine: Engine, state: TrainState) -> Loader:
    """A loader that begins at the state's next batch, in place of `loader`."""
    loader.close()
    return build_loader(config, stream, engine, state.batch)


def record_rollback(run: Path, log: MetricsLogger, state: TrainState, batches: range, steps_back: int) -> None:
    log.leave_out(batches, attempt=state.attempt, step=state.step, reason="spike", steps_back=steps_back)
    values = {"checkpoint": sharded.step_folder(run, state.step).name, "batches": [batches[0], batches[-1]]}
    record(run, state.attempt, "rollback", step=state.step, loss=state.left_out[-1]["loss"], **values)


class Validation:
    """The same held-out batches each time, with and without retrieved documents."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.streams = {"validation": build_stream(config, train=False)}
        if config.validation.index:
            self.streams["validation_without_retrieval"] = build_stream(config, train=False, retrieval=False)

    def run(self, engine: Engine) -> dict[str, float]:
        """Mean losses over the batches, named as metrics.jsonl has them."""
        losses = {}
        for name, stream in self.streams.items():
            loader = build_loader(self.config, stream, engine, start_batch=0)
            metrics = [engine.eval_step(next(loader)[1]) for _ in range(self.config.validation.batches)]
            loader.close()
            for field in ("loss", "loss_text", "loss_image"):
                losses[f"{name}_{field}"] = sum(getattr(each, field) for each in metrics) / len(metrics)
        return losses


def advance(state: TrainState, metrics: StepMetrics, config: Config) -> None:
    """Count the batch; ValueError after too many non-finite ones in a row."""
    state.tokens += metrics.tokens
    state.batch += 1
    if metrics.stepped:
        state.step += 1
        return
    state.skipped.append(state.batch - 1)
    # Below a warning: every rank knows it, the first one shows messages of this level.
    logger.info(
        "batch %d: loss %.6g, gradient norm %.6g; no rank stepped", state.batch - 1, metrics.loss, metrics.grad_norm
    )
    last = state.skipped[-config.train.max_skipped - 1 :]
    if len(last) > config.train.max_skipped and last[0] == state.batch - len(last):
        raise ValueError(
            f"{len(last)} batches in a row had a non-finite loss or gradient, {last[0]} to {last[-1]}; look at them "
            f"(tools/show_batch.py {Path(config.output) / 'config.yaml'} --batch {last[0]}), lower "
            f"optimizer.learning_rate or raise train.max_skipped."
        )


def train(config: Config, rank: Rank, allowed: list[str]) -> None:
    """Run the loop on this rank to train.steps, or to train.stop_after."""
    run, first = Path(config.output), rank.rank == 0
    stream = build_stream(config)
    follow_rule(config, count_parameters(config, stream.vocabulary.size))
    engine, state = open_run(config, stream, choose_device(config.train.device, rank), allowed)
    validation = Validation(config) if config.validation.interval else None
    if first:
        run.mkdir(parents=True, exist_ok=True)
        save_config(config, run / "config.yaml")
    end = min(config.train.steps, config.train.stop_after or config.train.steps)
    saver = RunSaver(engine, config, first, saved=state.step if state.attempt > 1 else None)
    saver.save_if_due(state)
    loader = build_loader(config, stream, engine, state.batch)
    with meter(max(0, end - state.step), "training", "steps", quiet=not first) as progress, saver:
        log = MetricsLogger(run, config, stream.vocabulary.size, rank.world_size, progress) if first else None
        guard = LossGuard(config)
        stragglers = StragglerWatch(config.cluster.straggler_interval, gather_objects, first)
        while state.step < end:
            if asked := guard.asked_from(state.batch):
                leave_out(state, asked, "asked")
                if log:
                    log.leave_out(asked, attempt=state.attempt, step=state.step, reason="asked")
                loader = restart_loader(loader, config, stream, engine, state)
            started = time.perf_counter()
            batch, micro_batches = next(loader)
            assert batch == state.batch, f"the loader is at batch {batch}, the run at {state.batch}"
            waited = time.perf_counter() - started
            rate = learning_rate(config, state.step)
            metrics = engine.train_step(micro_batches, state.step, rate)
            if first and not metrics.stepped:
                values = {"loss": plain(metrics.loss), "grad_norm": plain(metrics.grad_norm)}
                record(run, state.attempt, "skipped", step=state.step, batch=batch, **values)
            advance(state, metrics, config)
            state.cursor = loader.cursor
            seconds = time.perf_counter() - started
            extra = {} if metrics.stepped else {"skipped": NON_FINITE}
            extra |= stragglers.add(waited, engine.own_seconds())
            if validation and state.step % config.validation.interval == 0:
                extra |= validation.run(engine)
            if log:
                log.log(
                    seconds,
                    attempt=state.attempt,
                    step=state.step,
                    batch=batch,
                    loss=metrics.loss,
                    loss_text=metrics.loss_text,
                    loss_image=metrics.loss_image,
                    grad_norm=metrics.grad_norm,
                    learning_rate=rate,
                    tokens=state.tokens,
                    tokens_trimmed=metrics.tokens_trimmed,
                    data_seconds=waited,
                    **extra,
                )
            if metrics.stepped and guard.sees_spike(state, metrics.loss):
                saver.wait()
                spiked, (state, batches) = state.step, guard.roll_back(engine, state, metrics.loss)
                saver.saved = state.step
                if log:
                    record_rollback(run, log, state, batches, spiked - state.step)
                loader = restart_loader(loader, config, stream, engine, state)
                continue
            saver.poll()
            saver.save_if_due(state)
    loader.close()
    folder = saver.finish(state)
    if first:
        log.close()
        print(f"wrote {folder}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0 done, 2 for an error the user can mend (told once, by the rank that met it)."""
    options = parse_arguments(arguments)
    rank = Rank.from_environment()
    show_messages(logging.INFO if rank.rank == 0 else logging.WARNING)
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            if rank.rank == 0:
                print(dry_run(config, options.ranks or rank.world_size))
            return 0
        config.validate(rank.world_size)
        device = choose_device(config.train.device, rank)
    except ValueError as error:  # the same on every rank: the first one tells it
        if rank.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS_FOR_FIRST_RANK)
        return 2
    set_threads(config.train.threads, rank)
    store = meet(rank)
    try:
        if config.cluster.preflight:
            compare_ranks(config, rank, device, store)
        initialize_groups(config, rank, device, store)
        if config.cluster.preflight:
            check_all_reduce(device)
        train(config, rank, options.allow_change)
    except (ValueError, OSError) as error:
        if is_first_to_fail():
            print(f"error (rank {rank.rank}): {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
