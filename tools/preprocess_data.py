"""Tokenize a corpus of images and texts into WebDataset shards.

Input is JSON Lines ({"image": "relative/path.png", "caption": "text", ...}, {"text": "..."} or {"segments":
[{"text": "..."}, {"image": "..."}]} per line), CSV or Parquet with these columns, tars of img2dataset, a folder of
images with .txt captions next to them, or plain text; local paths or URLs. With --task, records become instruction
documents by the templates of a task; formats such as llava and vqa always do (docs/instruction_data.md). Unusable
inputs are counted and listed in quarantine.jsonl. The same command again finishes an interrupted run.

On several nodes, run the same command as a job array (SLURM_ARRAY_TASK_ID and _COUNT are read, or give --task-id and
--num-tasks), then run `preprocess_data.py merge --output shards/`.
"""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.data.preprocess.counts import QUARANTINE
from megatron_cm3leon.data.preprocess.dedupe import BY
from megatron_cm3leon.data.preprocess.filters import FITS, Filters
from megatron_cm3leon.data.preprocess.merge import merge
from megatron_cm3leon.data.preprocess.run import STAGES, PreprocessOptions, preprocess
from megatron_cm3leon.data.sources import FORMATS
from megatron_cm3leon.data.tasks.options import TASK_FORMATS, add_task_options, open_input
from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.slurm.array import find_task


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=HelpFormatter)
    parser.add_argument(
        "--input",
        type=user_path,
        required=True,
        nargs="+",
        help="files of one format, or one folder; paths, URLs or patterns",
    )
    parser.add_argument(
        "--format",
        choices=(*FORMATS, *TASK_FORMATS),
        default="auto",
        help="format of the input; auto: by file extension",
    )
    parser.add_argument(
        "--tokenizer", type=user_path, required=True, help="tokenizer folder that tools/train_tokenizer.py wrote"
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder of the shards")
    parser.add_argument("--image-field", default="", help='field or column of the image (default: "image", "jpg" ...)')
    parser.add_argument("--caption-field", default="", help='field or column of the text (default: "caption", "txt")')
    parser.add_argument("--workers", type=int, default=1, help="worker processes")
    parser.add_argument("--task-id", type=int, help="index of this task, from 0 (default: from the job array)")
    parser.add_argument("--num-tasks", type=int, help="tasks that share the input (default: from the job array)")
    parser.add_argument("--part-size", type=int, default=10_000, help="inputs per part; a part is the unit of resuming")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once")
    parser.add_argument("--device", default="auto", help="device that encodes the images: auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how an image is made square")
    parser.add_argument("--min-side", type=int, default=0, help="skip images whose shorter side is below this, pixels")
    parser.add_argument("--max-aspect", type=float, default=0.0, help="skip images above this side ratio; 0: no limit")
    parser.add_argument("--clean-captions", action="store_true", help="remove HTML and repeated white space")
    parser.add_argument("--deduplicate", nargs="+", choices=BY, default=[], help="skip exact duplicates by these")
    parser.add_argument(
        "--stage", choices=STAGES, default="all", help="with --deduplicate and several tasks: hash, then encode"
    )
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="maximum share of unusable inputs, 0 to 1")
    parser.add_argument("--overwrite", action="store_true", help="replace shards written with other options")
    add_task_options(parser)
    return parser.parse_args(arguments)


def merge_tasks(arguments: list[str]) -> int:
    """The command `merge`."""
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py merge",
        description="Write the manifest of what the tasks of a job array wrote.",
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder of the shards")
    output = parser.parse_args(arguments).output
    return report(merge(output, shlex.join(["preprocess_data.py", "merge", *arguments])), output)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["merge"]:
        return merge_tasks(arguments[1:])
    args = parse_arguments(arguments)
    for name, low, high in (("workers", 1, None), ("batch_size", 1, None), ("max_bad_fraction", 0, 1)):
        value = getattr(args, name)
        if not value >= low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be {bound}.")
    task, tasks = find_task(args.task_id, args.num_tasks)
    options = PreprocessOptions(
        tokenizer=Path(args.tokenizer),
        output=Path(args.output),
        workers=args.workers,
        batch_size=args.batch_size,
        device=resolve_device(args.device),
        filters=Filters(
            fit=args.fit, min_side=args.min_side, max_aspect=args.max_aspect, clean_captions=args.clean_captions
        ),
        deduplicate=tuple(args.deduplicate),
        task=task,
        tasks=tasks,
        stage=args.stage,
        max_bad_fraction=args.max_bad_fraction,
        overwrite=args.overwrite,
        command=shlex.join([Path(sys.argv[0]).name, *arguments]),
    )
    return report(preprocess(open_input(args, args.part_size, args.fit), options), args.output)


def report(result: dict, output: str) -> int:
    """Print how many inputs were written and how many were not, with the reasons; returns the exit status."""
    if not result:
        print(f"{output}: this task's hashes are done; when all tasks are done, continue with --stage encode.")
        return 0
    counts = result["accounts"]
    if result.get("already_complete"):
        print(f"{output} already holds these shards; nothing to do.")
    elif "shards" in result:
        print(f"{output}: {len(result['shards'])} shards.")
    else:
        print(f"{output}: this task's parts are done; when all tasks are done, run preprocess_data.py merge.")
    tokens = f" of {result['tokens']} tokens" if "tokens" in result else ""
    print(f"{counts['written']} documents{tokens} from {counts['read']} inputs.")
    if counts.get("duplicates", 0) + counts.get("filtered", 0):
        print(f"{counts['duplicates']} duplicates and {counts['filtered']} filtered inputs were skipped.")
    if counts["quarantined"]:
        print(f"{counts['quarantined']} unusable inputs are listed in {Path(output) / QUARANTINE}:")
    for reason, count in counts["reasons"].items():
        print(f"  {count} x {reason}")
    return 0


if __name__ == "__main__":
    run_tool(main)
