"""Print a batch as the model sees it: text, <specials>, pictures, sources and loss weights.

Any batch of any run can be printed again: a batch depends on the shards, the stream's settings, the seed
and its number alone. Give the run folder or a config.yaml and, as for training, section.key=value overrides.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.common.contact_sheet import draw_contact_sheet
from megatron_cm3leon.config.loading import SOURCE_FIELDS, Config, changed_fields, is_fixed, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.inspect.packing import describe_waste
from megatron_cm3leon.data.inspect.sequences import BlockPrinter, find_pictures
from megatron_cm3leon.data.stream.stream import Stream, build_stream
from megatron_cm3leon.monitoring.history import METRICS, REASONS, find_batch, read_history
from megatron_cm3leon.monitoring.positions import find_sequences
from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.images import from_pixels
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

LAST_BATCH = 1 << 40
"""Beyond, numbers of samples exceed 63 bits."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("config", type=user_path, help="YAML file, or a run folder, which has config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that replace the file's")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--batch", type=int, default=0, help="number of the batch, from 0")
    which.add_argument("--step", type=int, help="the batch on which the run of this folder took this step, from 1")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the batch to print; 0 prints all")
    parser.add_argument(
        "--report", type=int, default=0, metavar="BLOCKS",
        help="instead of tokens, count padding, trimmed tokens and whole queries in this many blocks from the batch on",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=user_path, help="tokenizer folder that turns text ids into text; without it ids are shown"
    )
    parser.add_argument(
        "--pictures",
        type=user_path,
        metavar="FILE",
        help="also draw the whole pictures of these blocks; needs --tokenizer",
    )
    parser.add_argument("--validation", action="store_true", help="print the validation data's batch")
    return parser.parse_intermixed_args(arguments)


def load_tokenizers(folder: str, vocabulary: Vocabulary) -> Tokenizers:
    """The tokenizers of a folder, whose vocabulary has to be the stream's."""
    check_same_vocabulary(vocabulary, Vocabulary.load(folder), f"--tokenizer {folder}")
    return Tokenizers.load(folder)


def draw_pictures(stream: Stream, numbers: range, tokenizers: Tokenizers, path: Path) -> int:
    """Decode the whole pictures of some blocks into one file; how many there were."""
    found = [
        (f"block {number}, token {place}", codes)
        for number in numbers
        for place, codes in find_pictures(stream.block(number).tokens, stream.vocabulary)
    ]
    if found:
        pixels = tokenizers.image.decode(torch.from_numpy(np.stack([codes for _, codes in found])))
        draw_contact_sheet([from_pixels(each) for each in pixels], [label for label, _ in found]).save(path)
    return len(found)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if min(args.batch, args.blocks, args.report) < 0:
        raise ValueError(
            f"--batch ({args.batch}), --blocks ({args.blocks}) and --report ({args.report}) must be at least 0."
        )
    if args.validation and args.step is not None:
        raise ValueError("--step is a step of training: a run's validation batches are numbered from 0; give --batch.")
    if args.batch >= LAST_BATCH:
        raise ValueError(f"--batch ({args.batch}) must be below {LAST_BATCH:,}.")
    path = Path(args.config)
    run = path if path.is_dir() else path.parent
    config = load_config(run / "config.yaml" if path.is_dir() else path, args.overrides)
    validate_config(config)
    changes = {}
    if args.step is not None or all((run / name).is_file() for name in ("config.yaml", METRICS)):
        changes = find_changes(load_config(run / "config.yaml", expand=False), config)
    if args.step is not None:
        refuse_another_stream(changes)
    batch = args.batch if args.step is None else find_batch(run, args.step)
    own = not args.validation and not changes  # the batches of the run, where there is one
    total = config.train.global_batch_size
    sequences = range(batch * total, (batch + 1) * total)
    if own:
        sequences, config = find_sequences(run, config, batch)
    stream = build_stream(config, train=not args.validation)
    first, total = sequences.start, len(sequences)
    if args.report:
        print(describe_waste(stream, first, args.report))
        return 0
    count = min(args.blocks or total, total)
    if args.pictures and not args.tokenizer:
        raise ValueError("--pictures needs --tokenizer, the folder that decodes them.")
    tokenizers = load_tokenizers(args.tokenizer, stream.vocabulary) if args.tokenizer else None
    printer = BlockPrinter(stream, tokenizers and tokenizers.text, colour=sys.stdout.isatty())
    note = describe_batch(run, batch) if own else ""
    print(f"batch {batch}: blocks {first}..{first + total - 1}, stream {stream.identity}{note}")
    for number in range(first, first + count):
        print()
        print(printer.describe(number))
    if count < total:
        print(f"\n({total - count} more blocks; --blocks 0 prints all)")
    if args.pictures:
        drawn = draw_pictures(stream, range(first, first + count), tokenizers, Path(args.pictures))
        print(f"\nwrote {args.pictures}: {drawn} pictures" if drawn else "\nno block holds a whole picture")
    return 0


def find_changes(own: Config, config: Config) -> dict[str, tuple]:
    """Field -> (value of the run, value now), of what determines which documents a step of the run saw."""
    validate_config(own)
    return {
        name: values
        for name, values in changed_fields(own, config).items()
        if (is_fixed(name) or name in SOURCE_FIELDS) and not name.startswith("model.")
    }


def refuse_another_stream(changes: dict[str, tuple]) -> None:
    """ValueError where overrides change which documents a step of the run saw."""
    for name, (before, after) in changes.items():
        raise ValueError(
            f"--step goes by the batches of the run, whose {name} is {before}, not {after}; leave the override "
            f"out, or give --batch."
        )


def describe_batch(run: Path, batch: int) -> str:
    """What a run did with a batch, where the folder has a record of it."""
    if not (run / METRICS).is_file():
        return ""
    history = read_history(run)
    if batch not in history:
        return ", not reached by this run"
    step, skipped = history[batch]
    return f", SKIPPED by this run after step {step}: {REASONS[skipped]}" if skipped else f", step {step}"


if __name__ == "__main__":
    run_tool(main)
