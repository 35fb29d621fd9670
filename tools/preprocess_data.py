"""Tokenise a corpus of pictures and texts into WebDataset shards.

Input is a JSONL file ({"image": "relative/path.png", "caption": "text", ...}, {"text": "..."} or {"segments":
[{"text": "..."}, {"image": "..."}]} a line), CSV or Parquet with these columns, img2dataset's tars, a folder of
pictures with .txt captions beside them, or plain text; local paths or URLs. Unusable inputs are listed in
quarantine.jsonl and counted. The same command again finishes a run that was interrupted.

On several nodes run the same command as a job array (SLURM_ARRAY_TASK_ID and _COUNT are read, or give --task-id and
--num-tasks), then `preprocess_data.py merge --output shards/`.
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
from megatron_cm3leon.data.sources import FORMATS, Fields, open_source
from megatron_cm3leon.distributed.device import resolve_device
from megatron_cm3leon.slurm.array import find_task


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=HelpFormatter)
    parser.add_argument(
        "--input",
        type=user_path,
        required=True,
        nargs="+",
        help="files of one format, or one folder; paths, URLs, patterns",
    )
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of the input; auto goes by names' endings")
    parser.add_argument(
        "--tokenizer", type=user_path, required=True, help="tokenizer folder that tools/train_tokenizer.py wrote"
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder of the shards")
    parser.add_argument("--image-field", default="", help='field or column of the picture (else "image", "jpg" ...)')
    parser.add_argument("--caption-field", default="", help='field or column of the caption (else "caption", "txt")')
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--task-id", type=int, help="which of the tasks this is, from 0 (default: by the job array)")
    parser.add_argument("--num-tasks", type=int, help="tasks that share the input (default: as the job array has)")
    parser.add_argument("--part-size", type=int, default=10_000, help="inputs a part; a part is the unit of resuming")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures encoded at once")
    parser.add_argument("--device", default="auto", help="where pictures are encoded: auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how a picture becomes square")
    parser.add_argument("--min-side", type=int, default=0, help="leave out pictures with a shorter side, pixels")
    parser.add_argument("--max-aspect", type=float, default=0.0, help="leave out longer pictures, side / side; 0: none")
    parser.add_argument("--clean-captions", action="store_true", help="drop HTML and repeated white space")
    parser.add_argument("--deduplicate", nargs="+", choices=BY, default=[], help="leave out exact duplicates by these")
    parser.add_argument("--stage", choices=STAGES, default="all", help="with --deduplicate over several tasks")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="largest share of unusable inputs, 0 to 1")
    parser.add_argument("--overwrite", action="store_true", help="replace shards made with other options")
    return parser.parse_args(arguments)


def merge_tasks(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py merge", description="Join what the tasks of a job array wrote: write the manifest."
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
    fields = Fields(args.image_field, args.caption_field)
    return report(preprocess(open_source(args.input, args.part_size, args.format, fields), options), args.output)


def report(result: dict, output: str) -> int:
    """Print what was written and what was not."""
    if not result:
        print(f"{output}: this task's hashes are done; when those of all tasks are, go on with --stage encode.")
        return 0
    accounts = result["accounts"]
    if result.get("already_complete"):
        print(f"{output} already holds these shards; nothing to do.")
    elif "shards" in result:
        print(f"{output}: {len(result['shards'])} shards.")
    else:
        print(f"{output}: this task's parts are done; when those of all tasks are, run preprocess_data.py merge.")
    tokens = f" of {result['tokens']} tokens" if "tokens" in result else ""
    print(f"{accounts['written']} documents{tokens} from {accounts['read']} inputs.")
    left_out = accounts.get("duplicates", 0) + accounts.get("filtered", 0)
    if left_out:
        print(f"{accounts['duplicates']} duplicates and {accounts['filtered']} filtered inputs were left out.")
    if accounts["quarantined"]:
        print(f"{accounts['quarantined']} unusable inputs are listed in {Path(output) / QUARANTINE}:")
    for reason, count in accounts["reasons"].items():
        print(f"  {count} x {reason}")
    return 0


if __name__ == "__main__":
    run_tool(main)
