"""Tokenise image-text pairs into WebDataset shards.

Input is a JSONL file ({"image": "relative/path.png", "caption": "text", ...} a line, paths relative to the
file) or a folder of pictures with .txt captions beside them. Unusable inputs are listed in
quarantine.jsonl and counted. The same command again finishes a run that was interrupted.
"""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_cm3leon.cli import run_tool
from megatron_cm3leon.data.preprocess import QUARANTINE, PreprocessOptions, preprocess
from megatron_cm3leon.data.sources import open_source


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--input", required=True, help="JSONL file of pairs, or folder of pictures and .txt captions")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder that tools/train_tokenizer.py wrote")
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--part-size", type=int, default=10_000, help="inputs a part; a part is the unit of resuming")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures encoded at once")
    parser.add_argument("--device", default="cpu", help="where pictures are encoded: cpu, cuda, cuda:1 ...")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="largest share of unusable inputs, 0 to 1")
    parser.add_argument("--overwrite", action="store_true", help="replace shards made with other options")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    for name, low, high in (("workers", 1, None), ("batch_size", 1, None), ("max_bad_fraction", 0, 1)):
        value = getattr(args, name)
        if not value >= low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be {bound}.")
    command = shlex.join([Path(sys.argv[0]).name, *(arguments if arguments is not None else sys.argv[1:])])
    options = PreprocessOptions(
        tokenizer=Path(args.tokenizer),
        output=Path(args.output),
        workers=args.workers,
        batch_size=args.batch_size,
        device=args.device,
        max_bad_fraction=args.max_bad_fraction,
        overwrite=args.overwrite,
        command=command,
    )
    manifest = preprocess(open_source(args.input, args.part_size), options)
    accounts = manifest["accounts"]
    if manifest.get("already_complete"):
        print(f"{args.output} already holds these shards; nothing to do.")
    else:
        print(f"{args.output}: {len(manifest['shards'])} shards.")
    print(f"{accounts['written']} documents of {manifest['tokens']} tokens from {accounts['read']} inputs.")
    if accounts["quarantined"]:
        print(f"{accounts['quarantined']} unusable inputs are listed in {Path(args.output) / QUARANTINE}:")
        for reason, count in accounts["reasons"].items():
            print(f"  {count} x {reason}")
    return 0


if __name__ == "__main__":
    run_tool(main)
