"""Evaluate an exported model on held-out shards: accuracies, losses and examples for tools/report.py.

    python tools/evaluate.py --model exported/ --shards heldout-shards/ --index heldout-index/ \\
        --checker examples/shapes/checker.py --output evaluation/
"""

import argparse
from dataclasses import fields

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.evaluation.evaluate import evaluate_model
from megatron_cm3leon.evaluation.options import EvaluationOptions
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.sampling import SAMPLERS


def parse_arguments() -> argparse.Namespace:
    defaults = EvaluationOptions()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote")
    add("--shards", type=user_path, required=True, help="shards of held-out pairs")
    add("--output", type=user_path, required=True, help="folder to write evaluation.json and pictures/ to")
    add("--index", type=user_path, help="index to retrieve documents from; without it nothing is retrieved")
    add("--checker", type=user_path, help="Python file with classify(image) and parse_caption(text); it is executed")
    add("--images", type=int, default=defaults.images, help="held-out pairs that are reported")
    add("--sweep-images", type=int, default=defaults.sweep_images, help="other pairs, to choose the guidance on")
    add("--guidance", type=float, nargs="+", default=defaults.guidance, help="guidance weights to compare; 1: none")
    add("--temperature", type=float, default=defaults.temperature, help="of generated images; 0 is greedy")
    add("--top-p", type=float, default=defaults.top_p, help="sample from the tokens that make up this probability")
    add("--sampler", choices=SAMPLERS, default=defaults.sampler, help="how random numbers select an image token")
    add("--documents", type=int, help="retrieved documents per prompt (default: as in training)")
    add("--examples", type=int, default=defaults.examples, help="examples of each kind to keep")
    add("--seed", type=int, default=defaults.seed, help="of the choice of pairs and of the images")
    add("--encoder", type=user_path, help="CLIP folder, if it was moved since the index recorded its path")
    add("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")
    for former, name in (("--pictures", "images"), ("--sweep-pictures", "sweep_images")):
        add(former, dest=name, type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    options = EvaluationOptions(**{field.name: getattr(arguments, field.name) for field in fields(EvaluationOptions)})
    result = evaluate_model(
        arguments.model,
        arguments.shards,
        arguments.output,
        options,
        checker=arguments.checker,
        index=arguments.index,
        encoder=arguments.encoder,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    for name, value in result["figures"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:.4g}" for key, number in value.items())
        print(f"{name}: {value if isinstance(value, str) or value is None else format(value, '.4g')}")
    print(f"wrote {arguments.output}/evaluation.json and pictures/ in {sum(result['seconds'].values()):.0f} s")


if __name__ == "__main__":
    run_tool(main)
