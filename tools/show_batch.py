"""Print a batch as the model sees it: text, <specials>, images, sources and loss weights.

Any batch of any run can be printed again: a batch depends only on the shards, the stream's settings, the seed and its
number. Give the run folder or a config.yaml and, as for training, section.key=value overrides.
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
from megatron_cm3leon.data.inspect.packing import describe_packing
from megatron_cm3leon.data.inspect.sequences import SequencePrinter, find_images
from megatron_cm3leon.data.stream.stream import Stream, build_stream
from megatron_cm3leon.monitoring.history import METRICS, REASONS, find_batch, read_history
from megatron_cm3leon.monitoring.positions import find_sequences
from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.images import from_pixels
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

BATCH_LIMIT = 1 << 40
"""From this batch on, sample numbers may exceed 63 bits."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("config", type=user_path, help="YAML file, or a run folder with its config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that override the file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--batch", type=int, default=0, help="number of the batch, from 0")
    which.add_argument("--step", type=int, help="print the batch of this step of the run, from 1")
    parser.add_argument("--blocks", type=int, default=4, help="sequences of the batch to print; 0 prints all")
    parser.add_argument(
        "--report", type=int, default=0, metavar="SEQUENCES",
        help="instead of tokens, count padding, trimmed tokens and complete queries in this many sequences, starting "
        "at the batch",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=user_path, help="tokenizer folder that decodes text ids; without it, ids are printed"
    )
    parser.add_argument(
        "--images",
        type=user_path,
        metavar="FILE",
        help="also draw the complete images of these sequences to this file; requires --tokenizer",
    )
    parser.add_argument(
        "--pictures", type=user_path, dest="images", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # its former name
    parser.add_argument("--validation", action="store_true", help="print a batch of the validation data")
    args = parser.parse_intermixed_args(arguments)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError for options out of range, or that exclude each other."""
    if min(args.batch, args.blocks, args.report) < 0:
        raise ValueError(
            f"--batch ({args.batch}), --blocks ({args.blocks}) and --report ({args.report}) must be at least 0."
        )
    if args.validation and args.step is not None:
        raise ValueError("--step is a training step: validation batches are numbered from 0; give --batch.")
    if args.batch >= BATCH_LIMIT:
        raise ValueError(f"--batch ({args.batch}) must be below {BATCH_LIMIT:,}.")
    if args.images and not args.tokenizer:
        raise ValueError("--images requires --tokenizer, the folder whose image tokenizer decodes them.")


def load_tokenizers(folder: str, vocabulary: Vocabulary) -> Tokenizers:
    """The tokenizers of a folder, which must have the vocabulary of the stream."""
    check_same_vocabulary(vocabulary, Vocabulary.load(folder), f"--tokenizer {folder}")
    return Tokenizers.load(folder)


def draw_images(stream: Stream, numbers: range, tokenizers: Tokenizers, path: Path) -> int:
    """Decode the complete images of some sequences into one file; returns how many there are."""
    found = [
        (f"sequence {number}, token {position}", codes)
        for number in numbers
        for position, codes in find_images(stream.sequence(number).tokens, stream.vocabulary)
    ]
    if found:
        pixels = tokenizers.image.decode(torch.from_numpy(np.stack([codes for _, codes in found])))
        draw_contact_sheet([from_pixels(image) for image in pixels], [label for label, _ in found]).save(path)
    return len(found)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    path = Path(args.config)
    run = path if path.is_dir() else path.parent
    config = load_config(run / "config.yaml" if path.is_dir() else path, args.overrides)
    validate_config(config)
    changes = {}
    if args.step is not None or all((run / name).is_file() for name in ("config.yaml", METRICS)):
        changes = find_changes(load_config(run / "config.yaml", expand=False), config)
    if args.step is not None:
        require_same_stream(changes)
    batch = args.batch if args.step is None else find_batch(run, args.step)
    is_of_run = not args.validation and not changes  # whether this is a batch of the run, if there is a run
    total = config.train.global_batch_size
    sequences = range(batch * total, (batch + 1) * total)
    if is_of_run:
        sequences, config = find_sequences(run, config, batch)
    stream = build_stream(config, train=not args.validation)
    if args.report:
        print(describe_packing(stream, sequences.start, args.report))
        return 0
    note = describe_batch(run, batch) if is_of_run else ""
    print(f"batch {batch}: sequences {sequences.start}..{sequences.stop - 1}, stream {stream.identity}{note}")
    print_sequences(stream, sequences, args)
    return 0


def print_sequences(stream: Stream, sequences: range, args: argparse.Namespace) -> None:
    """Print the first --blocks of these sequences, and draw their images if --images is given."""
    tokenizers = load_tokenizers(args.tokenizer, stream.vocabulary) if args.tokenizer else None
    printer = SequencePrinter(stream, tokenizers.text if tokenizers else None, color=sys.stdout.isatty())
    shown = sequences[: args.blocks] if args.blocks else sequences
    for number in shown:
        print()
        print(printer.describe(number))
    if len(shown) < len(sequences):
        print(f"\n({len(sequences) - len(shown)} more sequences; --blocks 0 prints all)")
    if args.images and tokenizers:
        drawn = draw_images(stream, shown, tokenizers, Path(args.images))
        print(f"\nwrote {args.images}: {drawn} images" if drawn else "\nno sequence holds a complete image")


def find_changes(recorded: Config, config: Config) -> dict[str, tuple]:
    """Field -> (value of the run, value now), for fields that determine which documents a step of the run saw."""
    validate_config(recorded)
    return {
        name: values
        for name, values in changed_fields(recorded, config).items()
        if (is_fixed(name) or name in SOURCE_FIELDS) and not name.startswith("model.")
    }


def require_same_stream(changes: dict[str, tuple]) -> None:
    """ValueError if overrides change which documents a step of the run saw."""
    for name, (before, after) in changes.items():
        raise ValueError(
            f"--step refers to the batches of the run, whose {name} is {before}, not {after}; remove the override, or "
            f"give --batch."
        )


def describe_batch(run: Path, batch: int) -> str:
    """What the run did with a batch, if the folder has a record of it."""
    if not (run / METRICS).is_file():
        return ""
    history = read_history(run)
    if batch not in history:
        return ", not reached by this run"
    step, skipped = history[batch]
    return f", SKIPPED by this run after step {step}: {REASONS[skipped]}" if skipped else f", step {step}"


if __name__ == "__main__":
    run_tool(main)
