"""Inspect a folder of shards: verify its checksums, print statistics, draw images decoded from the tokens."""

import argparse
from pathlib import Path

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.common.contact_sheet import draw_contact_sheet
from megatron_cm3leon.data.inspect.shards import decode_images, describe_shards, measure_shards, verify_shards
from megatron_cm3leon.data.shards.reader import open_shards


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--shards", type=user_path, required=True, help="folder that tools/preprocess_data.py wrote")
    parser.add_argument("--tokenizer", type=user_path, help="tokenizer folder of the shards, for --sheet")
    parser.add_argument("--sheet", type=user_path, help="PNG file to draw a contact sheet to")
    parser.add_argument("--images", type=int, default=24, help="images on the sheet")
    parser.add_argument("--pictures", type=int, dest="images", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--no-verify", action="store_true", help="skip the checksums, which need every byte to be read")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.sheet and not args.tokenizer:
        raise ValueError("--sheet requires --tokenizer, the folder whose image tokenizer decodes the images.")
    if args.images < 1:
        raise ValueError(f"--images ({args.images}) must be at least 1.")
    corpus = open_shards(args.shards)
    if not args.no_verify:
        verify_shards(corpus)
        files = sum(len(entry["files"]) for entry in corpus.shards)
        print(f"all {files} files match the checksums of the manifest.")
    print(describe_shards(corpus, measure_shards(corpus)))
    if args.sheet:
        from megatron_cm3leon.tokenizers.folder import Tokenizers

        images, captions = decode_images(corpus, Tokenizers.load(args.tokenizer), args.images)
        if not images:
            raise ValueError(f"--shards {args.shards} holds no image to draw; run without --sheet.")
        path = Path(args.sheet)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_contact_sheet(images, captions).save(path)
        print(f"{path}: {len(images)} images decoded from tokens.")
    return 0


if __name__ == "__main__":
    run_tool(main)
