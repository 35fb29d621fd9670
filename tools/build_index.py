"""Embed the documents of shards, index them, and write which documents each one may retrieve.

python tools/build_index.py --shards shards/ --encoder clip/ --output index/
python tools/build_index.py --shards heldout/ --bank index/ --encoder clip/ --output heldout_index/

The same command continues an interrupted run. On several nodes run it as a SLURM job array (SLURM_ARRAY_TASK_ID and
SLURM_ARRAY_TASK_COUNT are read, or give --task-id and --num-tasks): each task embeds its share. The same command as
one task then does the rest; or run --stage index as one task, --stage neighbors as a job array, and then the command.
"""

import argparse
from dataclasses import fields

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.retrieval.build import build_index_folder
from megatron_cm3leon.retrieval.options import STAGES, IndexOptions
from megatron_cm3leon.slurm.array import find_task


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build the retrieval index of shards: embeddings, FAISS index, table of neighbors.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--shards", type=user_path, required=True, help="shards whose documents are the queries")
    add("--bank", type=user_path, help="documents to retrieve: shards, or an index to use its bank (default: --shards)")
    add("--encoder", type=user_path, required=True, help="CLIP folder (tools/train_clip.py, or a published one)")
    add("--output", type=user_path, required=True, help="index folder to write; an unfinished one is continued")
    add("--overwrite", action="store_true", help="replace a finished index, encode again")
    add("--task-id", type=int, help="number of this task, from 0 (default: from the job array)")
    add("--num-tasks", type=int, help="number of tasks that share the work (default: from the job array)")
    add("--stage", choices=STAGES, default="", help="run this stage alone (empty: all; with several tasks: encode)")
    special = {"images": {"choices": ("source", "tokens")}, "tokenizer": {"type": user_path}}
    for field in fields(IndexOptions):
        add(
            f"--{field.name.replace('_', '-')}",
            default=field.default,
            help=HELP[field.name],
            **{"type": field.type} | special.get(field.name, {}),
        )
    add("--pictures", dest="images", choices=("source", "tokens"), default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    options = IndexOptions(**{field.name: getattr(arguments, field.name) for field in fields(IndexOptions)})
    task, tasks = find_task(arguments.task_id, arguments.num_tasks)
    description = build_index_folder(
        arguments.output,
        arguments.shards,
        arguments.encoder,
        arguments.bank,
        options,
        arguments.overwrite,
        arguments.stage,
        task,
        tasks,
    )
    if description is None:
        done = (
            "the index is built;"
            if arguments.stage == "index"
            else f"task {task} of {tasks} is done; after the last task"
        )
        print(f"{arguments.output}: {done} run the same command as one task, without --stage.")
    else:
        print_summary(arguments.output, description)


def print_summary(output: str, description: dict) -> None:
    """One line about a finished index; `description` is the content of index.json."""
    found, documents = description["neighbors_found"], max(1, description["documents"])
    mean = sum(count * number for count, number in enumerate(found)) / documents
    print(
        f"wrote {output}: {description['documents']} documents, {mean:.2f} of {description['neighbors']} neighbors "
        f"each ({found[-1] / documents:.1%} have all, {found[0]} none), index {description['factory']}, "
        f"recall@10 {description['recall_at_10']:.3f}"
    )


HELP = {
    "neighbors": "neighbors kept per document",
    "threshold": "largest cosine of a neighbor to the query and to another neighbor",
    "query_dropout": "share of the query's text tokens that is dropped for the search",
    "images": "encode the raw images (source), or images decoded from the shards' image tokens (tokens)",
    "tokenizer": "tokenizer folder, required by --images tokens and by documents other than pairs",
    "factory": "FAISS factory string (empty: chosen by the size of the bank)",
    "search": "FAISS search parameters, such as nprobe=64 (empty: chosen by measured recall)",
    "recall": "target recall@10 when search parameters are chosen",
    "candidates": "candidates of the first search per document, by text and by image each",
    "max_candidates": "most candidates that are searched if the filters leave too few neighbors",
    "recall_queries": "queries on which recall@10 is measured against exact search",
    "seed": "seed of query dropout, index training and recall sample",
    "device": "device of the encoder: auto, cpu, cuda, cuda:1 ...",
}


if __name__ == "__main__":
    run_tool(main)
