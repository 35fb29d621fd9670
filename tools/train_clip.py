"""Train a small CLIP on pairs, so that retrieval works without a published one.

python tools/train_clip.py --input pairs.jsonl --text-model tokenizer/text.model --output clip/ --steps 600
"""

import argparse
from dataclasses import fields

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.data.preprocess.raw_inputs import RawInputs, add_input_options
from megatron_cm3leon.retrieval.train_encoder import ClipOptions, train_clip


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small CLIP contrastively on image-text pairs; writes a CLIPModel folder.",
        formatter_class=HelpFormatter,
    )
    add_input_options(parser)
    parser.add_argument(
        "--text-model", type=user_path, required=True, help="SentencePiece model (text.model of a tokenizer folder)"
    )
    parser.add_argument("--output", type=user_path, required=True, help="CLIP folder to write")
    for field in fields(ClipOptions):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=field.type, default=field.default, help=HELP[field.name]
        )
    options = parser.parse_args()
    chosen = ClipOptions(**{field.name: getattr(options, field.name) for field in fields(ClipOptions)})
    inputs = RawInputs.open(options, "pairs")
    figures = train_clip(inputs, options.text_model, options.output, chosen)
    print(
        f"wrote {options.output}: trained on {figures['pairs']} pairs, loss {figures['loss']:.3f}; of "
        f"{figures['heldout_pairs']} held-out captions {figures['recall_at_1']:.1%} find their own picture first, "
        f"{figures['recall_at_10']:.1%} among ten"
    )
    if figures["skipped"]:
        print(f"{inputs.name}: {figures['skipped']}")


HELP = {
    "steps": "optimizer steps",
    "batch_size": "pairs in a step",
    "image_size": "side of the pictures the encoder sees, in pixels",
    "patch_size": "side of a patch, in pixels",
    "width": "width of the encoders and of the vectors",
    "layers": "layers of each encoder",
    "learning_rate": "peak learning rate",
    "max_scale": "largest scale of the cosines in the loss",
    "heldout": "share of the pairs measured with instead of trained on",
    "max_pairs": "pairs read at most",
    "threads": "CPU threads; a model this small is slower on many",
    "seed": "seed of weights, batches and held-out pairs",
}


if __name__ == "__main__":
    run_tool(main)
