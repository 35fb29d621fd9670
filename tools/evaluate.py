"""Evaluate a model: one task per command, or the report of held-out shards without a task.

    python tools/evaluate.py TASK ... --output results/      a task of the list below; TASK --help has its options
    python tools/evaluate.py --model exported/ --shards heldout-shards/ --index heldout-index/ \\
        --checker examples/shapes/checker.py --output evaluation/      what tools/report.py shows

caption, clip, geneval, harness, infill, loss and vqa share their work among the ranks of `torchrun --nproc-per-node 8
tools/evaluate.py TASK ...` or `srun -n 8 python tools/evaluate.py TASK ...`; the result is the same for any number.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.evaluation.evaluate import evaluate_model
from megatron_cm3leon.evaluation.options import EvaluationOptions
from megatron_cm3leon.evaluation.ranks import Ranks, start_ranks
from megatron_cm3leon.evaluation.tasks import SHARED, TASKS, load_task
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.sampling import SAMPLERS


def parse_arguments() -> argparse.Namespace:
    defaults = EvaluationOptions()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=HelpFormatter,
        epilog="tasks: " + "; ".join(f"{name} ({text})" for name, text in TASKS.items()),
    )
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


def _check_shared_options(name: str, options: argparse.Namespace) -> None:
    """ValueError for options of all tasks that no task can run with."""
    if Path(options.output).is_file():
        raise ValueError(f"--output ({options.output}) is a file; give a folder for {name}.json.")
    model = getattr(options, "model", None)
    if model is not None and not Path(model).is_dir():
        raise ValueError(f"--model ({model}) is not a folder; give one that tools/convert_checkpoint.py export wrote.")
    if options.seed < 0:
        raise ValueError(f"--seed ({options.seed}) must be at least 0.")


def run_task(name: str, arguments: list[str], ranks: Ranks) -> None:
    """Run one task; the first rank prints its figures and writes its result."""
    if name not in SHARED:
        ranks.require_one(f"the task {name}")
    module = load_task(name)
    parser = argparse.ArgumentParser(
        prog=f"evaluate.py {name}", description=module.__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    module.add_options(parser)
    parser.add_argument("--output", type=user_path, required=True, help=f"folder to write {name}.json to")
    # The first rank reads the command line: it prints --help, or what is wrong.
    options = argparse.Namespace(**ranks.from_first(lambda: vars(parser.parse_args(arguments))))
    _check_shared_options(name, options)
    result = module.evaluate(**vars(options), **({"ranks": ranks} if name in SHARED else {}))
    if result is None:
        return
    for figure, value in result.figures.items():
        print(f"{figure}: {value}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {result.write(options.output)}")


def main() -> None:
    with start_ranks() as ranks:
        if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
            if sys.argv[1] not in TASKS:
                raise ValueError(f"{sys.argv[1]!r} is not a task; the tasks are {', '.join(TASKS)}.")
            return run_task(sys.argv[1], sys.argv[2:], ranks)
        ranks.require_one("the report without a task")
    run_report()


def run_report() -> None:
    """Evaluate without a task, print the figures and write evaluation.json."""
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
