"""Build report.html and report.json from a run, its export and its evaluation.

python tools/report.py --evaluation evaluation/ --model exported/ --run runs/x --stages stages.tsv --output report/
"""

import argparse

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.evaluation.assemble import collect_report, write_report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--evaluation", type=user_path, required=True, help="folder that tools/evaluate.py wrote")
    parser.add_argument(
        "--model", type=user_path, required=True, help="folder that tools/convert_checkpoint.py export wrote"
    )
    parser.add_argument("--run", type=user_path, help="run folder of the training, for the loss curves")
    parser.add_argument(
        "--stages", type=user_path, help="times of the stages: lines of name, tab, seconds; or a JSON object"
    )
    parser.add_argument("--title", default="Captions to pictures and back", help="title of the page")
    parser.add_argument("--subtitle", default="", help="line beneath the title")
    parser.add_argument("--output", type=user_path, required=True, help="folder for report.html and report.json")
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
