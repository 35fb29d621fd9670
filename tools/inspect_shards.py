"""Look at a folder of shards: verify its checksums, print statistics, draw pictures decoded from the tokens."""

import argparse
from pathlib import Path

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.common.contact_sheet import draw_contact_sheet
from megatron_cm3leon.data.inspect.shards import decode_pictures, describe, measure, require_whole
from megatron_cm3leon.data.shards.reader import open_shards


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--shards", type=user_path, required=True, help="folder that tools/preprocess_data.py wrote")
    parser.add_argument("--tokenizer", type=user_path, help="its tokenizer folder, for --sheet")
    parser.add_argument("--sheet", type=user_path, help="PNG file of the contact sheet")
    parser.add_argument("--pictures", type=int, default=24, help="pictures on the sheet")
    parser.add_argument("--no-verify", action="store_true", help="skip the checksums, which read every byte")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.sheet and not args.tokenizer:
        raise ValueError("--sheet needs --tokenizer, the folder whose image tokenizer decodes the pictures.")
    if args.pictures < 1:
        raise ValueError(f"--pictures ({args.pictures}) must be at least 1.")
    corpus = open_shards(args.shards)
    if not args.no_verify:
        require_whole(corpus)
        print(f"all {3 * len(corpus.shards)} files have the checksums of the manifest.")
    print(describe(corpus, measure(corpus)))
    if args.sheet:
        from megatron_cm3leon.tokenizers.folder import Tokenizers

        pictures, captions = decode_pictures(corpus, Tokenizers.load(args.tokenizer), args.pictures)
        if not pictures:
            raise ValueError(f"{args.shards} holds no picture to draw.")
        path = Path(args.sheet)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_contact_sheet(pictures, captions).save(path)
        print(f"{path}: {len(pictures)} pictures decoded from tokens.")
    return 0


if __name__ == "__main__":
    run_tool(main)
