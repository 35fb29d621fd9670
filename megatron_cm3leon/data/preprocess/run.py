"""Preprocessing: a raw corpus -> tokenized shards, by several processes and tasks; every input is counted.

The input is cut into fixed parts, and each part is encoded by one process in fixed batches with one thread. So the
bytes of the shards depend only on input, tokenizers, filters, part size, batch size and kind of device. A part's files
are written under a temporary name and renamed when complete, then its record is written to `.work/`; the manifest is
written last. The same command again finishes an interrupted run: complete parts are kept.

Duplicates are found by hashing the whole input (dedupe.py) before anything is encoded. With several tasks, each task
works on the parts task, task + tasks, ...; `merge` (merge.py) then writes the manifest.
"""

import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.common.progress import Meter, meter
from megatron_cm3leon.data.preprocess.counts import QUARANTINE, InputCounts, check_bad_share, write_quarantine
from megatron_cm3leon.data.preprocess.dedupe import BY, find_duplicates, hashes_path
from megatron_cm3leon.data.preprocess.encoder import LoadTokenizers, WorkerSettings
from megatron_cm3leon.data.preprocess.filters import Filters
from megatron_cm3leon.data.preprocess.merge import lock_output, write_manifest
from megatron_cm3leon.data.preprocess.worker import (
    WORK,
    SharedCounters,
    Worker,
    build_tokenizer_loader,
    init_worker,
    record_path,
    run_in_worker,
)  # fmt: skip
from megatron_cm3leon.data.shards.reader import MANIFEST, open_shards
from megatron_cm3leon.data.shards.targets import TARGETS_ENDING
from megatron_cm3leon.data.sources import Source

logger = logging.getLogger(__name__)
STAGES = ("all", "hash", "encode")
_POLL_SECONDS = 0.5
_DEFAULTS = {**Filters().to_dict(), "deduplicate": [], "tasks": []}
"""Options that manifests record only if they differ from these values."""


@dataclass(kw_only=True)
class PreprocessOptions:
    """Options of tools/preprocess_data.py."""

    tokenizer: Path
    """Tokenizer folder."""
    output: Path
    """Folder of the shards."""
    workers: int = 1
    """Worker processes; with 1, the calling process does the work."""
    batch_size: int = 32
    """Images encoded at once."""
    device: str = "cpu"
    """Device of the image tokenizer; cuda: worker i on GPU i modulo the number of GPUs."""
    filters: Filters = field(default_factory=Filters)
    deduplicate: tuple[str, ...] = ()
    """Values of dedupe.BY: documents with the same image or caption as an earlier one are skipped."""
    task: int = 0
    """Index of this task, from 0."""
    tasks: int = 1
    """Tasks that share the input."""
    stage: str = "all"
    """hash: only hash the inputs; encode: only find the duplicates and encode; all: both."""
    max_bad_fraction: float = 0.01
    """Maximum share of unusable inputs, 0 to 1."""
    overwrite: bool = False
    """Replace shards that were written with other options."""
    command: str = ""
    """Command line, for the manifest."""
    load_tokenizers: LoadTokenizers | None = None
    """None: tokenizers.folder.Tokenizers.load."""

    def __post_init__(self) -> None:
        if not 0 <= self.task < self.tasks:
            raise ValueError(
                f"--task-id ({self.task}) must be 0 to {self.tasks - 1}, below --num-tasks ({self.tasks})."
            )
        unknown = [what for what in self.deduplicate if what not in BY]
        if unknown or self.stage not in STAGES:
            raise ValueError(f"--deduplicate must be {' or '.join(BY)}, and --stage one of {', '.join(STAGES)}.")
        if self.stage != "all" and not self.deduplicate:
            raise ValueError(f"--stage {self.stage} requires --deduplicate, which is not given.")
        if self.stage == "all" and self.deduplicate and self.tasks > 1:
            raise ValueError(
                "--deduplicate with several tasks requires two stages, because duplicates may be in any part: run all "
                "tasks with --stage hash, then all tasks with --stage encode, then merge."
            )
        if self.overwrite and self.tasks > 1:
            raise ValueError(
                f"--overwrite with several tasks would remove files of the other tasks; remove {self.output} first."
            )


def preprocess(source: Source, options: PreprocessOptions) -> dict:
    """Write the shards of `source`; returns the manifest, with "already_complete" if the shards existed.

    One of several tasks writes no manifest: it returns {"accounts": ..} of its parts, and stage hash returns {}.
    Raises ValueError if the folder holds other files, or if too many inputs are unusable.
    """
    if source.tasks and options.filters.clean_captions:
        raise ValueError(
            "--clean-captions is for captions, not for the pieces of instruction documents; clean the input."
        )
    load = options.load_tokenizers or build_tokenizer_loader("cpu")
    tokenizers = load(options.tokenizer)
    plan = _make_plan(source, options, tokenizers.vocabulary.hash)
    about = {
        "parts": source.parts,
        "input": str(source.folder),
        "image_size": tokenizers.image.image_size,
        "vocabulary": tokenizers.vocabulary.to_dict(),
        "max_bad_fraction": options.max_bad_fraction,
        "workers": options.workers,
        "command": options.command,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    with lock_output(options.output, shared=options.tasks > 1):
        complete = _prepare_folder(options, plan, about)
        if complete:
            accounts = complete["accounts"]
            check_bad_share(accounts["quarantined"], accounts["read"], options.max_bad_fraction, options.output)
            return {**complete, "already_complete": True}
        if options.deduplicate and options.stage != "encode":
            _run_parts(Worker.hash_part, "hash", source, options)
            if options.stage == "hash":
                return {}
        if options.deduplicate:
            _require_hashes(options.output / WORK, source.parts)
            find_duplicates(options.output / WORK, source.parts, options.deduplicate)
        counts = _run_parts(Worker.encode_part, "preprocess", source, options)
        if options.tasks > 1:
            return {"accounts": counts.to_dict()}
        return write_manifest(options.output, {**plan, "about": about})


def _make_plan(source: Source, options: PreprocessOptions, vocabulary: str) -> dict:
    """The settings that the bytes of the shards depend on."""
    chosen = {
        **options.filters.to_dict(),
        "deduplicate": sorted(options.deduplicate),
        "tasks": list(source.tasks),
    }
    return {
        "input_sha256": source.identity,
        "vocabulary": vocabulary,
        "part_size": source.part_size,
        "batch_size": options.batch_size,
        "device": options.device.split(":")[0],
        **{name: value for name, value in chosen.items() if value != _DEFAULTS[name]},
    }


def _require_hashes(work: Path, parts: int) -> None:
    missing = [part for part in range(parts) if not hashes_path(work, part).is_file()]
    if missing and not (work / "duplicates.npy").is_file():
        raise ValueError(
            f"{len(missing)} of {parts} parts have no hashes yet, such as part {missing[0]}; finish every task with "
            f"--stage hash first."
        )


def _prepare_folder(options: PreprocessOptions, plan: dict, about: dict) -> dict | None:
    """Prepare the folder for this plan; returns the manifest if the folder already holds these shards."""
    output, work = options.output, options.output / WORK
    found: dict = {}
    recorded = plan
    names = sorted(path.name for path in output.iterdir() if path.name != WORK)
    if not (output / MANIFEST).is_file() and not (work / "plan.json").is_file():
        if names:
            raise ValueError(
                f"--output {output} holds other files ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}) and "
                f"no shards; give a new or empty folder."
            )
    elif options.overwrite:
        write_json(work / "plan.json", {**plan, "about": about})  # first: an interrupted run leaves a known folder
        _remove_shards(output)
    elif (output / MANIFEST).is_file():
        found = open_shards(output).manifest  # also raises an error for damaged files
        recorded = found.get("options", {})
    else:
        recorded = json.loads((work / "plan.json").read_text())
    differing = list(_compare_plans(recorded, plan))
    if differing:
        raise ValueError(
            f"--output {output} holds shards written with other options ({'; '.join(differing)}). Give another "
            f"folder, or replace these shards with --overwrite."
        )
    if found:
        return found
    work.mkdir(exist_ok=True)
    if options.tasks == 1:  # no other process works in this folder
        for path in [*work.glob("*.tmp"), *work.glob(".*.tmp")]:
            # A worker that outlives its killed run may be renaming its file.
            with suppress(FileNotFoundError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(work / "plan.json", {**plan, "about": about})
    return None


def _compare_plans(recorded: dict, plan: dict) -> Iterator[str]:
    recorded = {**_DEFAULTS, **recorded, "device": str(recorded.get("device")).split(":")[0]}
    for name, value in {**_DEFAULTS, **plan}.items():
        if recorded.get(name) != value:
            what = "the input has changed, or is a different one: " if name == "input_sha256" else ""
            yield f"{what}{name}: {recorded.get(name)}, now {value}"


def _remove_shards(output: Path) -> None:
    """Remove the files that this tool writes, the manifest first, and no other files."""
    work = output / WORK
    endings = (".tar", ".idx.npy", ".parquet", TARGETS_ENDING)
    shards = [path for path in output.glob("shard-*") if path.name.endswith(endings)]
    notes = [*work.glob("part-*.json"), *work.glob("*.npy")]
    for path in (output / MANIFEST, output / QUARANTINE, *notes, *shards):
        path.unlink(missing_ok=True)


def _run_parts(
    method: Callable[[Worker, int], dict], label: str, source: Source, options: PreprocessOptions
) -> InputCounts:
    """Call `method` of a worker for all parts of this task; stops as soon as too many inputs are unusable."""
    context = multiprocessing.get_context("spawn")
    shared = SharedCounters.create(context)
    settings = WorkerSettings(
        source, options.output, options.batch_size, options.filters, options.device, options.tokenizer,
        options.load_tokenizers, bool(options.deduplicate),
    )  # fmt: skip
    parts = range(options.task, source.parts, options.tasks)
    sizes = [size for part in parts if (size := source.part_inputs(part)) is not None]
    total = sum(sizes) if len(sizes) == len(parts) else None
    with meter(total, label, "inputs") as progress:
        if options.workers <= 1 or len(parts) <= 1:
            threads = torch.get_num_threads()
            try:
                worker = Worker(settings, shared, progress)
                results = (method(worker, part) for part in parts)
                return _collect(results, len(parts), total, options, shared)
            finally:
                torch.set_num_threads(threads)
        with ProcessPoolExecutor(min(options.workers, len(parts)), context, init_worker, (settings, shared)) as pool:
            try:
                futures = [pool.submit(run_in_worker, method, part) for part in parts]
                return _collect(_completed(futures, shared, progress), len(parts), total, options, shared)
            except BrokenProcessPool as error:
                raise OSError(
                    "a worker process was killed (often because the memory was full); lower --workers or "
                    "--batch-size and run the same command again: complete parts are kept."
                ) from error
            finally:
                shared.stop.value = 1
                pool.shutdown(cancel_futures=True)


def _completed(futures: list[Future[dict]], shared: SharedCounters, progress: Meter) -> Iterator[dict]:
    """Results as they arrive; the workers' counts are shown while waiting."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
        progress.advance(shared.done.value - progress.done)
        for future in done:
            yield future.result()
    progress.advance(shared.done.value - progress.done)


def _collect(
    results: Iterable[dict], parts: int, total: int | None, options: PreprocessOptions, shared: SharedCounters
) -> InputCounts:
    """Sum up the parts' counts; ValueError once too many inputs are unusable, whatever the remaining parts hold."""
    counts, read = InputCounts(), 0
    for done, part_counts in enumerate(results, 1):
        counts.add(part_counts)
        read += part_counts["read"]
        # If inputs cannot be counted in advance, the other parts and tasks are assumed to have as many as these.
        expected = options.tasks * (total or read * parts / done)
        if counts.quarantined > options.max_bad_fraction * expected:
            shared.stop.value = 1
            _write_known_quarantine(options.output)
            check_bad_share(counts.quarantined, counts.read, options.max_bad_fraction, options.output, expected)
    if options.tasks > 1:
        _write_known_quarantine(options.output)
        if counts.quarantined > options.max_bad_fraction * read:
            logger.warning(
                "%d of the %d inputs of this task are unusable, more than --max-bad-fraction %g of them: merge will "
                "fail unless the other tasks have fewer.",
                counts.quarantined, read, options.max_bad_fraction,
            )  # fmt: skip
    return counts


def _write_known_quarantine(output: Path) -> None:
    """Write the quarantined inputs of the finished parts of all tasks to quarantine.jsonl."""
    write_quarantine(output, sorted((output / WORK).glob(record_path(Path(), 0).name.replace("000000", "*"))))
