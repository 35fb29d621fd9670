"""Write the condition images of a corpus (edges, strokes, lines, regions, given maps) beside its images and captions.

python tools/make_conditions.py --input pairs.jsonl --condition canny --output canny/ --workers 8
"""

import argparse

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.data.preprocess.conditions import RECORDS, SHEET, ConditionSettings, make_conditions
from megatron_cm3leon.data.preprocess.raw_inputs import add_input_options
from megatron_cm3leon.data.sources import Fields
from megatron_cm3leon.data.tasks.conditions import WEIGHTS, list_conditions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write the condition images of a corpus, and its pairs with a field `condition`.",
        formatter_class=HelpFormatter,
    )
    add_input_options(parser)
    add = parser.add_argument
    add("--condition", required=True, choices=list_conditions(), help="what is made of each image")
    add("--output", type=user_path, required=True, help="folder to write; an interrupted run continues there")
    add("--size", type=int, default=0, help="crop and resize images to this size first, pixels; 0 keeps them")
    add(
        "--map-field", default="", help="field with the path of a map that depth, normals or segmentation is drawn from"
    )
    add("--invert-map", action="store_true", help="depth: the maps are distances, whose near values are the small ones")
    add(
        "--weights",
        type=user_path,
        default=WEIGHTS,
        help="weights of controlnet-aux's detectors: a folder, or a repository of the hub",
    )
    add("--workers", type=int, default=1, help="worker processes")
    add("--max-bad-fraction", type=float, default=0.01, help="share of unusable inputs above which the run stops")
    add("--sheet", type=int, default=24, help="pairs on the contact sheet")
    arguments = parser.parse_args()
    for name, low, high in (("workers", 1, None), ("sheet", 1, None), ("max_bad_fraction", 0, 1)):
        value = getattr(arguments, name)
        if value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be {bound}.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    settings = ConditionSettings(
        arguments.condition, arguments.size, arguments.map_field, arguments.invert_map, arguments.weights
    )
    fields = Fields(arguments.image_field, arguments.caption_field)
    counts = make_conditions(
        arguments.input, arguments.output, settings, arguments.format, fields, arguments.workers,
        arguments.max_bad_fraction, arguments.sheet,
    )  # fmt: skip
    print(f"wrote {arguments.output}/{RECORDS}: {counts.written} pairs with {arguments.condition}; look at {SHEET}")
    if counts.quarantined:
        print(f"{counts.quarantined} inputs are not usable: quarantine.jsonl says why")


if __name__ == "__main__":
    run_tool(main)
