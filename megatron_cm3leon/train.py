"""Train a model: `torchrun --nproc-per-node 4 -m megatron_cm3leon.train config.yaml section.key=value ...`

Starting the same command again resumes from the last complete checkpoint of the run folder.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

# When one rank ends, the C++ code of torch prints a stack of forty lines in every other rank; the cause is reported
# once (runtime/watchdog.py). torch reads the variable when it is loaded; errors are still printed.
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")

from megatron_cm3leon.checkpoint.format import step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.common.cli import show_messages, user_path
from megatron_cm3leon.config.loading import Config, load_config, save_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.inspect.mixture import describe_mixture
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.data.stream.stream import Stream, build_stream
from megatron_cm3leon.distributed.launch import Rank, choose_device, set_threads
from megatron_cm3leon.engine.groups import ignore_library_warnings
from megatron_cm3leon.model.initialization import VERSION as INITIAL_WEIGHTS
from megatron_cm3leon.model.memory import PAPER_IMAGE_CODES, PAPER_VOCABULARY, describe_memory
from megatron_cm3leon.model.weights import count_parameters
from megatron_cm3leon.runtime.attempt import Attempt, start_attempt
from megatron_cm3leon.runtime.exit_status import USER_ERROR
from megatron_cm3leon.training.base_model import describe_base
from megatron_cm3leon.training.loop import TrainingLoop
from megatron_cm3leon.training.lr_schedule import follow_rule
from megatron_cm3leon.training.saving import RunSaver
from megatron_cm3leon.training.setup import open_run
from megatron_cm3leon.training.validation import Validation

logger = logging.getLogger(__name__)
SECONDS_FOR_FIRST_RANK = 20
"""A launcher ends all ranks when one has ended: the others wait, so that the first rank can print its error."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron_cm3leon.train", description=__doc__)
    parser.add_argument(
        "config", type=user_path, help="YAML file of the run; megatron_cm3leon/config/schema.py documents every field"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="fields that replace those of the YAML"
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="field of the model or the stream that a resumed run may change, such as cm3.probability; repeatable",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print ranks, groups, parameters and bytes per rank; start nothing"
    )
    parser.add_argument(
        "--local-rank",
        "--local_rank",
        type=int,
        help="set by the deepspeed launcher; ignored: LOCAL_RANK is read",
    )
    parser.add_argument("--ranks", type=int, default=0, help="ranks of a dry run (default: the launched ranks)")
    return parser.parse_args(arguments)


def dry_run(config: Config, ranks: int) -> str:
    """What the run needs on `ranks` ranks, as text; ValueError where the layout or train.init is not possible."""
    validate_config(config, ranks)
    folder = config.data.sources[0].shards if config.data.sources else config.data.shards
    vocabulary = open_shards(folder).vocabulary if folder else None
    size = vocabulary.size if vocabulary else PAPER_VOCABULARY
    follow_rule(config, count_parameters(config, size))
    image_size = vocabulary.image_size if vocabulary else PAPER_IMAGE_CODES
    base = [describe_base(config, vocabulary)] if config.train.init else []
    memory = describe_memory(config, size, ranks, image_size)
    return "\n\n".join(filter(None, (*base, memory, describe_mixture(config))))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns an exit status of runtime/exit_status.py. One rank reports an error, not all."""
    options = parse_arguments(arguments)
    ignore_library_warnings()
    rank = Rank(0, 1, 0, 1)
    try:
        rank = Rank.from_environment()
        show_messages(logging.INFO if rank.rank == 0 else logging.WARNING)
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            if rank.rank == 0:
                print(dry_run(config, options.ranks or rank.world_size))
            return 0
        validate_config(config, rank.world_size)
        device = choose_device(config.train.device, rank)
    except ValueError as error:  # the same on every rank: the first one reports it
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS_FOR_FIRST_RANK)
        return USER_ERROR
    set_threads(config.train.threads, rank)
    with start_attempt(config, rank, device) as attempt:
        attempt.watch.progress("opening the data")
        stream = build_stream(config)
        if attempt.first:
            report_data(config, stream)
        follow_rule(config, count_parameters(config, stream.vocabulary.size))
        attempt.watch.progress("building the model and loading a checkpoint")
        engine, state, checkpoint = open_run(config, stream, device, options.allow_change)
        attempt.watch.progress("opening the validation data")
        validation = Validation(config, stream.vocabulary) if config.validation.interval else None
        record_start(attempt, config, state, checkpoint)
        saver = RunSaver(engine, config, attempt.first, saved=state.step if checkpoint else None)
        loop = TrainingLoop(config, attempt, stream, engine, state, validation, saver)
        reason = loop.run()
        if attempt.first:
            print(f"wrote {step_folder(attempt.run, loop.state.step)}")
        attempt.finish(reason, loop.state.step)
    return attempt.exit_status


def report_data(config: Config, stream: Stream) -> None:
    """Print the mixture, and log which instruction documents cannot be used as configured."""
    if table := describe_mixture(config):
        print(table, flush=True)
    for problem in stream.report_problems():
        logger.warning("%s", problem)


def record_start(attempt: Attempt, config: Config, state: TrainState, checkpoint: Path | None) -> None:
    """Write config.yaml, and the event of a resumed (from `checkpoint`) or a new run; the first rank does."""
    state.attempt = attempt.number
    if not attempt.first:
        return
    save_config(config, attempt.run / "config.yaml")
    if checkpoint:
        attempt.record("resume", step=state.step, checkpoint=checkpoint.name)
    else:
        init = {"init": state.init} if state.init else {}
        attempt.record("initialize", step=0, weights=INITIAL_WEIGHTS, seed=config.seed, **init)


if __name__ == "__main__":
    sys.exit(main())
