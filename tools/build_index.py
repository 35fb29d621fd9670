"""Embed the documents of shards, index them, and write which ones each document may retrieve.

python tools/build_index.py --shards shards/ --encoder clip/ --output index/
python tools/build_index.py --shards heldout/ --bank index/ --encoder clip/ --output heldout_index/

A run that was interrupted is finished by the same command. On several nodes run the same command as a job array
(SLURM_ARRAY_TASK_ID and _COUNT are read, or give --task-id and --num-tasks): each task embeds its share. The same
command as one task then does the rest; or --stage index as one task, --stage neighbors as a job array, and then it.
"""

import argparse
from dataclasses import fields

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.retrieval.build import build_index_folder
from megatron_cm3leon.retrieval.options import STAGES, IndexOptions
from megatron_cm3leon.slurm.array import find_task


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build the retrieval index of shards: embeddings, FAISS index, table of neighbours.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--shards", type=user_path, required=True, help="shards whose documents are the queries")
    parser.add_argument(
        "--bank",
        type=user_path,
        help="what is retrieved from: shards, or an index whose bank is used (default: --shards)",
    )
    parser.add_argument(
        "--encoder", type=user_path, required=True, help="CLIP folder (tools/train_clip.py, or a published one)"
    )
    parser.add_argument(
        "--output", type=user_path, required=True, help="index folder to write; an unfinished one is continued"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished index, encode again")
    parser.add_argument("--task-id", type=int, help="which of the tasks this is, from 0 (default: by the job array)")
    parser.add_argument("--num-tasks", type=int, help="tasks that share the work (default: as the job array has)")
    parser.add_argument("--stage", choices=STAGES, default="", help="do this alone (empty: all; several tasks: encode)")
    add = {"pictures": {"choices": ("source", "tokens")}, "tokenizer": {"type": user_path}}
    for field in fields(IndexOptions):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=field.default,
            help=HELP[field.name],
            **{"type": field.type} | add.get(field.name, {}),
        )
    options = parser.parse_args()
    chosen = IndexOptions(**{field.name: getattr(options, field.name) for field in fields(IndexOptions)})
    task, tasks = find_task(options.task_id, options.num_tasks)
    description = build_index_folder(
        options.output,
        options.shards,
        options.encoder,
        options.bank,
        chosen,
        options.overwrite,
        options.stage,
        task,
        tasks,
    )
    if description is None:
        done = (
            "the index is built; go on"
            if options.stage == "index"
            else f"task {task} of {tasks} is done; go on, when all are,"
        )
        print(f"{options.output}: {done} with the same command as one task, without --stage.")
        return
    found = description["neighbors_found"]
    full = found[-1] / max(1, description["documents"])
    mean = sum(count * documents for count, documents in enumerate(found)) / max(1, description["documents"])
    print(
        f"wrote {options.output}: {description['documents']} documents, {mean:.2f} of {description['neighbors']} "
        f"neighbours each ({full:.1%} have all, {found[0]} none), index {description['factory']}, "
        f"recall@10 {description['recall_at_10']:.3f}"
    )


HELP = {
    "neighbors": "neighbours kept for each document",
    "threshold": "largest cosine of a neighbour to the query and to another neighbour",
    "query_dropout": "share of the query's text tokens left out when searching",
    "pictures": "encode the raw pictures, or those decoded from the shards' image tokens",
    "tokenizer": "tokenizer folder, for --pictures tokens and for documents other than pairs",
    "factory": "FAISS factory string (empty: by the size of the bank)",
    "search": "FAISS search parameters, such as nprobe=64 (empty: by measured recall)",
    "recall": "recall@10 that search parameters are chosen for",
    "candidates": "candidates searched first for each document, by text and by picture each",
    "max_candidates": "candidates searched where the filters leave too few neighbours",
    "recall_queries": "queries on which recall@10 is measured against exact search",
    "seed": "seed of query dropout, index training and recall sample",
    "device": "device of the encoder: auto, cpu, cuda, cuda:1 ...",
}


if __name__ == "__main__":
    run_tool(main)
