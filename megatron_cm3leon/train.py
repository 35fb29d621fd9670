"""Train a model: `torchrun --nproc-per-node 4 -m megatron_cm3leon.train config.yaml section.key=value ...`

Starting the same command again resumes from the last complete checkpoint of the run folder.
"""

import argparse
import logging
import os
import sys
import time

from megatron_cm3leon.common.cli import show_messages, user_path
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.distributed.launch import Rank, choose_device, set_threads
from megatron_cm3leon.engine.groups import ignore_library_warnings
from megatron_cm3leon.model.memory import PAPER_VOCABULARY, describe_memory
from megatron_cm3leon.model.weights import count_parameters
from megatron_cm3leon.runtime.attempt import run_attempt
from megatron_cm3leon.runtime.exit_status import USER_ERROR
from megatron_cm3leon.training.loop import Training
from megatron_cm3leon.training.lr_schedule import follow_rule

SECONDS_FOR_FIRST_RANK = 20
"""A launcher ends all ranks with the first that ends: the others wait, so that the first rank's sentence is printed."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron_cm3leon.train", description=__doc__)
    parser.add_argument(
        "config", type=user_path, help="YAML file of the run; megatron_cm3leon/config/schema.py documents every field"
    )
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
    parser.add_argument(
        "--local-rank", "--local_rank", type=int, help="set by the deepspeed launcher; the variable LOCAL_RANK counts"
    )
    parser.add_argument("--ranks", type=int, default=0, help="ranks of a dry run (default: those that were launched)")
    return parser.parse_args(arguments)


def dry_run(config: Config, ranks: int) -> str:
    """What the run would need on `ranks` ranks; ValueError where the layout cannot be built."""
    config.validate(ranks)
    folder = config.data.sources[0].shards if config.data.sources else config.data.shards
    size = open_shards(folder).vocabulary.size if folder else PAPER_VOCABULARY
    follow_rule(config, count_parameters(config, size))
    return describe_memory(config, size, ranks)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is that of runtime/attempt.py. Errors are told once, by the rank that met them."""
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
        config.validate(rank.world_size)
        device = choose_device(config.train.device, rank)
    except ValueError as error:  # the same on every rank: the first one tells it
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS_FOR_FIRST_RANK)
        return USER_ERROR
    set_threads(config.train.threads, rank)
    return run_attempt(config, rank, device, lambda attempt: Training(config, attempt, options.allow_change).train())


if __name__ == "__main__":
    sys.exit(main())
