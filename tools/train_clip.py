"""Train a small CLIP on pairs, so that retrieval works without a published one.

python tools/train_clip.py --input pairs.jsonl --text-model tokenizer/text.model --output clip/ --steps 600
"""

import argparse
from dataclasses import fields

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.data.preprocess.raw_inputs import RawInputs, add_input_options
from megatron_cm3leon.retrieval.train_encoder import ClipOptions, train_clip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small CLIP contrastively on image-text pairs; writes a CLIPModel folder.",
        formatter_class=HelpFormatter,
    )
    add_input_options(parser)
    add = parser.add_argument
    add("--text-model", type=user_path, required=True, help="SentencePiece model (text.model of a tokenizer folder)")
    add("--output", type=user_path, required=True, help="CLIP folder to write")
    for field in fields(ClipOptions):
        add(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default, help=HELP[field.name])
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    options = ClipOptions(**{field.name: getattr(arguments, field.name) for field in fields(ClipOptions)})
    inputs = RawInputs.open(arguments, "pairs")
    figures = train_clip(inputs, arguments.text_model, arguments.output, options)
    print(
        f"wrote {arguments.output}: trained on {figures['pairs']} pairs, loss {figures['loss']:.3f}; of "
        f"{figures['heldout_pairs']} held-out captions {figures['recall_at_1']:.1%} find their own image first, "
        f"{figures['recall_at_10']:.1%} among ten"
    )
    if figures["skipped"]:
        print(f"{inputs.name}: {figures['skipped']}")


HELP = {
    "steps": "optimizer steps",
    "batch_size": "pairs per step",
    "image_size": "height and width of the images that the encoder sees, pixels",
    "patch_size": "height and width of a patch, pixels",
    "width": "width of the encoders and of the vectors",
    "layers": "layers of each encoder",
    "learning_rate": "peak learning rate",
    "max_scale": "largest scale of the cosines in the loss",
    "heldout": "share of the pairs that is held out from training and measured with",
    "max_pairs": "most pairs that are read",
    "threads": "CPU threads; a small model is slower with many threads",
    "seed": "seed of weights, batches and held-out pairs",
}


if __name__ == "__main__":
    run_tool(main)
