"""Print a batch as the model sees it: text, <specials>, pictures, sources and loss weights.

Any batch of any run can be printed again: a batch depends on the shards, the stream's settings, the seed
and its number alone. Give the run's config.yaml and, as for training, section.key=value overrides.
"""

import argparse
import sys
from pathlib import Path

from megatron_cm3leon.cli import run_tool
from megatron_cm3leon.config import load_config
from megatron_cm3leon.data.show import BlockPrinter
from megatron_cm3leon.data.stream import build_stream


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("config", help="YAML file, such as the config.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that replace the file's")
    parser.add_argument("--batch", type=int, default=0, help="number of the batch, from 0")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the batch to print; 0 prints all")
    parser.add_argument("--tokenizer", help="tokenizer folder that turns text ids into text; without it ids are shown")
    parser.add_argument("--validation", action="store_true", help="print the validation data's batch")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.batch < 0 or args.blocks < 0:
        raise ValueError(f"--batch ({args.batch}) and --blocks ({args.blocks}) must be at least 0.")
    config = load_config(args.config, args.overrides)
    config.validate()
    stream = build_stream(config, train=not args.validation)
    tokenizer = None
    if args.tokenizer:
        from megatron_cm3leon.tokenizers.text import TextTokenizer
        from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

        check_same_vocabulary(stream.vocabulary, Vocabulary.load(args.tokenizer), f"--tokenizer {args.tokenizer}")
        tokenizer = TextTokenizer.load(Path(args.tokenizer) / "text.model")
    first = args.batch * stream.global_batch_size
    count = min(args.blocks or stream.global_batch_size, stream.global_batch_size)
    printer = BlockPrinter(stream, tokenizer, colour=sys.stdout.isatty())
    print(f"batch {args.batch}: blocks {first}..{first + stream.global_batch_size - 1}, stream {stream.fingerprint}")
    for number in range(first, first + count):
        print()
        print(printer.describe(number))
    if count < stream.global_batch_size:
        print(f"\n({stream.global_batch_size - count} more blocks; --blocks 0 prints all)")
    return 0


if __name__ == "__main__":
    run_tool(main)
