"""Convert a training checkpoint for inference and back, and third-party image tokenizers.

    python tools/convert_checkpoint.py export --checkpoint runs/x/checkpoints/step-00001000 \\
        --tokenizer tok/ --output exported/
    python tools/convert_checkpoint.py import --model exported/ --output runs/y
    python tools/convert_checkpoint.py merge --checkpoint runs/lora --output runs/merged
    python tools/convert_checkpoint.py peft --checkpoint runs/lora --output adapter/
    python tools/convert_checkpoint.py image --weights vqgan.ckpt --image-size 256 --output tok/

`export` writes a folder that stock transformers classes and tools/generate.py load. `import` converts it to a run
folder, from which training continues under any layout and either engine. Both end by comparing logits, and write
nothing if they differ. `merge` adds adapters (lora) and other trained parts (train.only) to their base: a full
checkpoint. `peft` writes adapters as stock peft loads them. `image` converts VQGANs of the taming layout (taming,
Chameleon, gumbel) and LlamaGen's to a tokenizer folder. docs/conversion.md has the details.
"""

import argparse
import re

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?i?B)?", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid size; write 5GB, 500MB or 2GiB.")
    return int(float(found[1]) * _UNITS[(found[2] or "B").upper()])


def parse_arguments() -> argparse.Namespace:
    formatted = {"formatter_class": HelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **formatted)
    commands = parser.add_subparsers(dest="command", required=True)

    export = commands.add_parser("export", help="checkpoint -> OPT, Llama or Qwen3 folder", **formatted)
    add = export.add_argument
    add(
        "--checkpoint",
        type=user_path,
        required=True,
        help="checkpoint folder, such as runs/x/checkpoints/step-00001000, or a run: its newest",
    )
    add("--tokenizer", type=user_path, required=True, help="tokenizer folder the run was trained with")
    add(
        "--output",
        type=user_path,
        required=True,
        help="folder to write; must be new or empty, or an export with --overwrite",
    )
    add("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="type of the weights in the files")
    add("--shard-size", type=parse_size, default="5GB", help="largest size of a file of weights, such as 500MB or 2GiB")
    add(
        "--check-corpus",
        type=user_path,
        metavar="FILE",
        help="text file; tokenizer.json must give the ids of text.model for every line",
    )
    add("--overwrite", action="store_true", help="replace an earlier export, once the new one is complete and checked")
    _add_check_shards(export)

    back = commands.add_parser("import", help="exported folder -> run folder with a checkpoint", **formatted)
    back.add_argument("--model", type=user_path, required=True, help="folder that `export` wrote")
    back.add_argument("--output", type=user_path, required=True, help="run folder to write; must be new or empty")
    _add_check_shards(back)

    merge = commands.add_parser(
        "merge", help="adapters and their base -> run folder with a full checkpoint", **formatted
    )
    _add_adapter(merge)
    merge.add_argument("--output", type=user_path, required=True, help="run folder to write; must be new or empty")
    merge.add_argument(
        "--base", type=user_path, help="checkpoint or export of the base (default: the folder that the run recorded)"
    )

    peft = commands.add_parser("peft", help="adapters -> folder that stock peft loads", **formatted)
    _add_adapter(peft)
    peft.add_argument("--output", type=user_path, required=True, help="folder to write; must be new or empty")
    peft.add_argument(
        "--base", type=user_path, help="export of the base, for adapter_config.json (default: the recorded folder)"
    )
    peft.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="type of the weights")

    image = commands.add_parser("image", help="third-party VQGAN -> tokenizer folder", **formatted)
    add = image.add_argument
    add(
        "--weights",
        type=user_path,
        required=True,
        help=".ckpt, .pt, .pth or .safetensors of the taming layout or LlamaGen's",
    )
    add("--image-size", type=int, required=True, help="height and width of an image in pixels (taming: resolution)")
    add(
        "--output",
        type=user_path,
        required=True,
        help="tokenizer folder to write image/ to; vocab.json follows with text.model",
    )
    add("--specials", type=int, default=1024, help="special tokens of the joint vocabulary, sentinels included")
    add("--sentinels", type=int, default=512, help="sentinel tokens among the specials")
    return parser.parse_args()


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=user_path,
        required=True,
        help="checkpoint of a run with lora.rank or train.only, or the run: its newest",
    )


def _add_check_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check-shards",
        type=user_path,
        metavar="FOLDER",
        help="shards to take a real sequence from (default: the run's own)",
    )


def export_tool(arguments: argparse.Namespace) -> None:
    from megatron_cm3leon.export import export_checkpoint

    metadata = export_checkpoint(
        arguments.checkpoint,
        arguments.tokenizer,
        arguments.output,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_size,
        check_shards=arguments.check_shards,
        check_corpus=arguments.check_corpus,
        overwrite=arguments.overwrite,
    )
    print(f"{metadata['class']} against the trained model: {metadata['check']}")
    print(f"tokenizer.json: {metadata['tokenizer_json']}")
    print(
        f"wrote {arguments.output}: {metadata['parameters']:,} parameters of {metadata['checkpoint']} in "
        f"{metadata['dtype']}, with the tokenizers"
    )


def import_tool(arguments: argparse.Namespace) -> None:
    from megatron_cm3leon.export import import_export

    folder, comparison = import_export(arguments.model, arguments.output, check_shards=arguments.check_shards)
    print(f"the checkpoint against the export: {comparison.describe()}")
    print(f"wrote {folder}; continue with: torchrun ... -m megatron_cm3leon.train {arguments.output}/config.yaml")


def merge_tool(arguments: argparse.Namespace) -> None:
    from megatron_cm3leon.training.merge import merge_adapter

    folder = merge_adapter(arguments.checkpoint, arguments.output, arguments.base)
    print(f"wrote {folder}; export it with: tools/convert_checkpoint.py export --checkpoint {arguments.output} ...")


def peft_tool(arguments: argparse.Namespace) -> None:
    from megatron_cm3leon.export.peft import export_adapter
    from megatron_cm3leon.training.merge import open_adapter

    reader = open_adapter(arguments.checkpoint)
    metadata = export_adapter(reader, arguments.output, base=arguments.base, dtype=arguments.dtype)
    print(
        f"wrote {arguments.output}: adapters of {metadata['class']}, {metadata['parameters']:,} parameters of "
        f"{metadata['checkpoint']} in {metadata['dtype']}; its base is {metadata['base']['folder']}"
    )


def image_tool(arguments: argparse.Namespace) -> None:
    from megatron_cm3leon.tokenizers.image_import import import_image_tokenizer, write_image_tokenizer

    tokenizer, account = import_image_tokenizer(arguments.weights, arguments.image_size)
    sizes = {"specials": arguments.specials, "sentinels": arguments.sentinels}
    vocabulary = write_image_tokenizer(tokenizer, account, arguments.output, **sizes)
    height, width = tokenizer.grid
    skipped = f"; weights skipped because only training uses them: {account['left_out']}" if account["left_out"] else ""
    print(
        f"wrote {arguments.output}/image: {account['layout']} layout, {height} x {width} tokens per image of "
        f"{arguments.image_size} pixels, {tokenizer.codebook_size:,} codes{skipped}"
    )
    if vocabulary is None:
        print(f"vocab.json follows when tools/train_tokenizer.py text wrote to {arguments.output} too")
    else:
        print(f"wrote {arguments.output}/vocab.json: {vocabulary.size:,} ids, hash {vocabulary.hash}")


def main() -> None:
    arguments = parse_arguments()
    run = {
        "export": export_tool,
        "import": import_tool,
        "merge": merge_tool,
        "peft": peft_tool,
        "image": image_tool,
    }
    run[arguments.command](arguments)


if __name__ == "__main__":
    run_tool(main)
