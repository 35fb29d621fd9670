"""Convert a training checkpoint for inference.

    python tools/convert_checkpoint.py export --checkpoint runs/x/checkpoints/step-00001000 \\
        --tokenizer tok/ --output exported/

`export` writes a folder that stock `OPTForCausalLM.from_pretrained` and tools/generate.py load, after
comparing its logits with the trained model's.
"""

import argparse

from megatron_cm3leon.checkpoint.convert import DTYPES, LARGEST_LOGIT_DIFFERENCE, export_checkpoint
from megatron_cm3leon.cli import run_tool
from megatron_cm3leon.engine.trained import open_trained_model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export",
        help="write an OPT folder with the tokenizers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    export.add_argument(
        "--checkpoint", required=True, help="checkpoint folder, such as runs/x/checkpoints/step-00001000"
    )
    export.add_argument("--tokenizer", required=True, help="tokenizer folder the run was trained with")
    export.add_argument("--output", required=True, help="folder to write; must be new or empty")
    export.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="type of the weights in the files")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    options = (arguments.checkpoint, arguments.tokenizer, arguments.output)
    if arguments.dtype == "fp32":
        with open_trained_model(arguments.checkpoint) as logits:
            account = export_checkpoint(*options, trained_logits=logits)
    else:  # the weights are rounded: compared with a plain forward of the rounded ones
        account = export_checkpoint(*options, dtype=arguments.dtype)
    print(
        f"max |logit difference| between OPTForCausalLM and the trained model, fp32 weights: "
        f"{account['max_abs_logit_diff']:.3g} in fp64 arithmetic (at most {LARGEST_LOGIT_DIFFERENCE:g}); in fp32 "
        f"{account['max_relative_logit_diff_fp32']:.3g} of the largest logit"
    )
    print(f"wrote {arguments.output}: {account['parameters']:,} parameters in {account['dtype']}, with the tokenizers")


if __name__ == "__main__":
    run_tool(main)
