"""Build report.html and report.json from a run, its export and its evaluation.

python tools/report.py --evaluation evaluation/ --model exported/ --run runs/x --stages stages.tsv --output report/
"""

import argparse

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.evaluation.assemble import collect_report, write_report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--evaluation", type=user_path, required=True, help="folder that tools/evaluate.py wrote")
    add("--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote")
    add("--run", type=user_path, help="run folder of the training, for the loss curves")
    add("--stages", type=user_path, help="times of the stages: lines of name, tab, seconds; or a JSON object")
    add("--title", default="From captions to images and back", help="title of the page")
    add("--subtitle", default="", help="line below the title")
    add("--output", type=user_path, required=True, help="folder to write report.html and report.json to")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    content, figures = collect_report(
        arguments.evaluation,
        arguments.model,
        arguments.run,
        arguments.stages,
        arguments.title,
        arguments.subtitle,
    )
    write_report(arguments.output, content, figures, arguments.evaluation)
    print(f"wrote {arguments.output}/report.html and report.json")


if __name__ == "__main__":
    run_tool(main)
