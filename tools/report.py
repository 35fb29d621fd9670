"""Build report.html and report.json from a run, its export and its evaluation, or from the results of several runs.

    python tools/report.py --evaluation evaluation/ --model exported/ --run runs/x --stages stages.tsv --output report/
    python tools/report.py --compare base=results/base large=results/large --output comparison/

What --compare takes are files TASK.json of tools/evaluate.py, or folders with such files. Results in folders named
step-STEP are curves over training.
"""

import argparse

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.evaluation.assemble import collect_report, write_report
from megatron_cm3leon.evaluation.compare import read_runs
from megatron_cm3leon.evaluation.compare_page import EXAMPLES, write_comparison


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--compare", nargs="+", metavar="[NAME=]RESULTS", help="results of runs to compare, a file or folder each")
    add("--evaluation", type=user_path, help="folder that tools/evaluate.py wrote without a task")
    add("--model", type=user_path, help="folder that tools/convert_checkpoint.py export wrote")
    add("--run", type=user_path, help="run folder of the training, for the loss curves")
    add("--stages", type=user_path, help="times of the stages: lines of name, tab, seconds; or a JSON object")
    add("--title", help="title of the page")
    add("--subtitle", default="", help="line below the title")
    add("--examples", type=int, default=EXAMPLES, help="rows of images of --compare, per result")
    add("--output", type=user_path, required=True, help="folder to write report.html and report.json to")
    arguments = parser.parse_args()
    single = [name for name in ("evaluation", "model", "run", "stages") if getattr(arguments, name) is not None]
    if arguments.compare and single:
        parser.error(f"--compare and --{single[0]} are of different reports; give one of them")
    if not arguments.compare and not (arguments.evaluation and arguments.model):
        parser.error("give --evaluation and --model, or --compare")
    return arguments


def expand_argument(argument: str) -> str:
    """PATH or NAME=PATH with ~ and $VARIABLE expanded in the path."""
    name, separator, path = argument.rpartition("=")
    return f"{name}{separator}{user_path(path)}"


def main() -> None:
    arguments = parse_arguments()
    if arguments.compare:
        if arguments.examples < 0:
            raise ValueError(f"--examples ({arguments.examples}) must be at least 0.")
        runs = read_runs([expand_argument(argument) for argument in arguments.compare])
        write_comparison(runs, arguments.output, arguments.title or "Comparison of runs", arguments.examples)
        print(f"wrote {arguments.output}/report.html and report.json")
        return
    content, figures = collect_report(
        arguments.evaluation,
        arguments.model,
        arguments.run,
        arguments.stages,
        arguments.title or "From captions to images and back",
        arguments.subtitle,
    )
    write_report(arguments.output, content, figures, arguments.evaluation)
    print(f"wrote {arguments.output}/report.html and report.json")


if __name__ == "__main__":
    run_tool(main)
