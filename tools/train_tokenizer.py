"""Train the text or the image tokenizer of a folder, in either order; the second run writes vocab.json.

    python tools/train_tokenizer.py text  --input pairs.jsonl --vocab-size 56320 --output tok/
    python tools/train_tokenizer.py image --input pairs.jsonl --image-size 32 --downsample 4 \\
        --codebook-size 128 --output tok/

The input has any format that tools/preprocess_data.py reads: JSONL, CSV, Parquet, img2dataset's tars, folders, plain
text; one folder or several files. The image tokenizer needs no captions, the text tokenizer no images.
"""

import argparse
import math
from pathlib import Path

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.data.preprocess.raw_inputs import ImageLoader, RawInputs, add_input_options
from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.tokenizers.folder import IMAGE_FOLDER, TEXT_MODEL, VOCABULARY, write_vocabulary
from megatron_cm3leon.tokenizers.image_training import ImageTrainingOptions, train_and_measure
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vqgan import VQGANConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary, add_flags in (
        ("text", "SentencePiece BPE with byte fallback", add_text_flags),
        ("image", "VQGAN, encoder and decoder", add_image_flags),
    ):
        command = commands.add_parser(name, help=summary, formatter_class=HelpFormatter)
        add_input_options(command, tasks=True)
        command.add_argument("--output", type=user_path, required=True, help="tokenizer folder to write to")
        add_flags(command)
        command.add_argument(
            "--specials", type=int, default=1024, help="special tokens of the joint vocabulary, sentinels included"
        )
        command.add_argument("--sentinels", type=int, default=512, help="sentinel tokens among the specials")
    return parser.parse_args()


def add_text_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--vocab-size", type=int, default=56320, help="text pieces, bytes included")
    command.add_argument(
        "--coverage",
        type=float,
        default=0.9995,
        help="share of the characters in the text that get a piece; rarer ones are encoded as bytes",
    )


def add_image_flags(command: argparse.ArgumentParser) -> None:
    add_network_flags(command)
    add_training_flags(command)


def add_network_flags(command: argparse.ArgumentParser) -> None:
    network = command.add_argument_group("network")
    add = network.add_argument
    add("--image-size", type=int, default=256, help="height and width of an image, pixels")
    add(
        "--downsample",
        type=int,
        default=8,
        help="height and width of the patch of one image token, pixels; a power of 2",
    )
    add("--codebook-size", type=int, default=8192, help="codes, K")
    add("--embed-dim", type=int, default=16, help="width of a code")
    add("--base-channels", type=int, default=32, help="channels at full resolution")
    add(
        "--channel-multiplier",
        type=int,
        nargs="+",
        help="channels per level as multiples of the base channels, log2(downsample) + 1 numbers (default: all 1)",
        default=argparse.SUPPRESS,
    )
    add(
        "--latent-channels",
        type=int,
        help="channels between encoder and codebook (default: the base channels)",
        default=argparse.SUPPRESS,
    )
    add("--num-res-blocks", type=int, default=0, help="residual blocks per level; decoder levels have one more")
    add("--attn-resolutions", type=int, nargs="*", default=[], help="resolutions with attention, pixels")
    add("--mid-attention", action="store_true", help="attention at the lowest resolution")
    add("--norm", choices=("pixel", "group"), default="pixel", help="over one pixel, or (taming) the whole image")
    add(
        "--encoder-kernel",
        type=int,
        choices=(1, 3),
        default=1,
        help="1: with norm=pixel a code is a function of its own patch alone, easy to predict; 3: taming",
    )


def add_training_flags(command: argparse.ArgumentParser) -> None:
    defaults = ImageTrainingOptions()
    training = command.add_argument_group("training")
    add = training.add_argument
    add("--steps", type=int, default=defaults.steps, help="optimizer steps")
    add(
        "--warmup-steps",
        type=int,
        default=argparse.SUPPRESS,
        help="first steps, without the codebook (default: a third)",
    )
    add("--batch-size", type=int, default=defaults.batch_size, help="images per step")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="peak learning rate")
    add("--loss", choices=("l1", "l2"), default=defaults.loss, help="reconstruction error per pixel")
    add("--commitment", type=float, default=defaults.commitment, help="weight of the commitment term")
    add(
        "--codebook",
        choices=("ema", "gradient"),
        default=defaults.codebook,
        help="codes follow latents as moving averages, or by gradient",
    )
    add("--ema-decay", type=float, default=defaults.ema_decay, help="share of the moving average that is kept per step")
    add(
        "--revive-below",
        type=float,
        default=defaults.revive_below,
        help="a code restarts below this share of a uniform use of all codes",
    )
    add("--precision", choices=("bf16", "fp32"), default=defaults.precision, help="precision of the training")
    add("--seed", type=int, default=defaults.seed, help="seed of weights, batches and codebook")
    add(
        "--heldout",
        type=user_path,
        nargs="+",
        default=None,
        help="files or folder to measure on, instead of a share of the input",
    )
    add("--heldout-share", type=float, default=0.05, help="share of the input held out to measure on")
    add("--device", default="auto", help="where to train: auto, cpu, cuda, cuda:1 ...")


def main() -> None:
    arguments = parse_arguments()
    output = Path(arguments.output)
    if arguments.command == "text":
        train_text_tool(arguments, output)
    else:
        train_image_tool(arguments, output)
    vocabulary = write_vocabulary(output, specials=arguments.specials, sentinels=arguments.sentinels)
    if vocabulary is None:
        other = "image" if arguments.command == "text" else "text"
        print(f"{VOCABULARY} is written when the {other} tokenizer is in {output}, too")
    else:
        print(
            f"wrote {output / VOCABULARY}: {vocabulary.size:,} ids = {vocabulary.text_size:,} text + "
            f"{vocabulary.image_size:,} image + {vocabulary.specials:,} special, hash {vocabulary.hash}"
        )


def train_text_tool(arguments: argparse.Namespace, output: Path) -> None:
    inputs = RawInputs.open(arguments, "texts")
    tokenizer = train_text(inputs.texts(), arguments.vocab_size, coverage=arguments.coverage)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output / TEXT_MODEL)
    print(f"wrote {output / TEXT_MODEL}: {tokenizer.size:,} pieces")
    report_skipped(inputs)


def train_image_tool(arguments: argparse.Namespace, output: Path) -> None:
    config, options, device = build_config(arguments), build_options(arguments), resolve_device(arguments.device)
    inputs, heldout, load = RawInputs.open(arguments, "images"), None, ImageLoader()
    if arguments.heldout:
        heldout = RawInputs.open(argparse.Namespace(**{**vars(arguments), "input": arguments.heldout}), "images")
    tokenizer, description = train_and_measure(
        inputs.images(),
        config,
        options,
        heldout_paths=heldout.images() if heldout else None,
        heldout_share=arguments.heldout_share,
        device=device,
        load=load,
    )
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output / IMAGE_FOLDER, training=description)
    measured, (height, width) = description["heldout"], tokenizer.grid
    print(
        f"wrote {output / IMAGE_FOLDER}: {height} x {width} tokens per image, {config.codebook_size:,} codes; "
        f"{measured['pictures']} held-out images: PSNR {measured['psnr_db']:.2f} dB, "
        f"{measured['codes_used']:.0%} of the codes used, perplexity {measured['codebook_perplexity']:.1f}"
    )
    load.add_to(inputs.reasons)
    report_skipped(*filter(None, (inputs, heldout)))


def report_skipped(*several: RawInputs) -> None:
    for inputs in several:
        if skipped := inputs.explain_skipped():
            print(f"{inputs.name}: {skipped}")


def build_config(arguments: argparse.Namespace) -> VQGANConfig:
    levels = math.log2(arguments.downsample) + 1 if arguments.downsample > 0 else 0.5
    if levels != int(levels):
        raise ValueError(f"--downsample ({arguments.downsample}) must be a power of 2: 1, 2, 4, 8 ...")
    multiplier = getattr(arguments, "channel_multiplier", [1] * int(levels))
    if len(multiplier) != levels:
        raise ValueError(
            f"--channel-multiplier has {len(multiplier)} numbers; --downsample {arguments.downsample} has "
            f"{int(levels)} levels; give {int(levels)} numbers."
        )
    return VQGANConfig(
        image_size=arguments.image_size,
        codebook_size=arguments.codebook_size,
        embed_dim=arguments.embed_dim,
        latent_channels=getattr(arguments, "latent_channels", arguments.base_channels),
        base_channels=arguments.base_channels,
        channel_multiplier=multiplier,
        num_res_blocks=arguments.num_res_blocks,
        attn_resolutions=arguments.attn_resolutions,
        mid_attention=arguments.mid_attention,
        norm=arguments.norm,
        encoder_kernel=arguments.encoder_kernel,
    )


def build_options(arguments: argparse.Namespace) -> ImageTrainingOptions:
    given = {
        name: value for name, value in vars(arguments).items() if name in ImageTrainingOptions.__dataclass_fields__
    }
    return ImageTrainingOptions(**given)


if __name__ == "__main__":
    run_tool(main)
