"""Preprocessing: a raw corpus -> tokenised shards, by several processes and tasks, with an account of every input.

The input is cut into fixed parts, each part is encoded by one process in fixed batches with one thread:
the bytes of the shards depend on input, tokenizers, filters, part size, batch size and kind of device alone. A
part's files are written under a temporary name and renamed when whole; its record in `.work/` follows them; the
manifest is written last. A run that was interrupted is finished by the same command: whole parts are kept.

Duplicates are found by a pass of hashes over the whole input (dedupe.py) before anything is encoded. Several tasks
work on parts task, task + tasks, ...; `merge` (merge.py) then writes the manifest.
"""

import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_cm3leon.common.progress import Meter, meter
from megatron_cm3leon.data.preprocess.counts import QUARANTINE, Account, check_bad_share, write_quarantine
from megatron_cm3leon.data.preprocess.dedupe import BY, find_duplicates, hashes_path
from megatron_cm3leon.data.preprocess.filters import Filters
from megatron_cm3leon.data.preprocess.merge import finish, lock_output
from megatron_cm3leon.data.preprocess.worker import (
    WORK,
    Shared,
    Task,
    begin_work,
    hash_part,
    load_on,
    record_path,
    work_on_part,
)  # fmt: skip
from megatron_cm3leon.data.shards.reader import MANIFEST, open_shards, write_json
from megatron_cm3leon.data.sources import Source

logger = logging.getLogger(__name__)
STAGES = ("all", "hash", "encode")
_POLL_SECONDS = 0.5
_DEFAULTS = {**Filters().to_dict(), "deduplicate": []}
"""Of what manifests record only where it differs."""


@dataclass(kw_only=True)
class PreprocessOptions:
    """What tools/preprocess_data.py was asked for."""

    tokenizer: Path
    """Tokenizer folder."""
    output: Path
    """Folder of the shards."""
    workers: int = 1
    """Processes; 1 works in the calling one."""
    batch_size: int = 32
    """Pictures encoded at once."""
    device: str = "cpu"
    """Where the image tokenizer computes; cuda: worker i on GPU i modulo their number."""
    filters: Filters = field(default_factory=Filters)
    deduplicate: tuple[str, ...] = ()
    """Of dedupe.BY: by what duplicates are found and left out."""
    task: int = 0
    """Which of the tasks this is."""
    tasks: int = 1
    """Tasks that share the input."""
    stage: str = "all"
    """hash: only look at what may be a duplicate; encode: only what follows."""
    max_bad_fraction: float = 0.01
    """Largest share of unusable inputs."""
    overwrite: bool = False
    """Replace shards that were made with other options."""
    command: str = ""
    """Command line, for the manifest."""
    load_tokenizers: Callable | None = None
    """Loads the tokenizer folder; None is tokenizers.folder.Tokenizers.load."""

    def __post_init__(self) -> None:
        if not 0 <= self.task < self.tasks:
            raise ValueError(
                f"--task-id ({self.task}) must be 0 to {self.tasks - 1}, below --num-tasks ({self.tasks})."
            )
        unknown = [what for what in self.deduplicate if what not in BY]
        if unknown or self.stage not in STAGES:
            raise ValueError(f"--deduplicate takes {' and '.join(BY)}; --stage one of {', '.join(STAGES)}.")
        if self.stage != "all" and not self.deduplicate:
            raise ValueError(f"--stage {self.stage} belongs to --deduplicate, which is not given.")
        if self.stage == "all" and self.deduplicate and self.tasks > 1:
            raise ValueError(
                "--deduplicate over several tasks takes two rounds, as duplicates may stand anywhere: run all tasks "
                "with --stage hash, and when they are done the same with --stage encode, then merge."
            )
        if self.overwrite and self.tasks > 1:
            raise ValueError(
                f"--overwrite with several tasks would remove what other tasks write; remove {self.output} first."
            )


def preprocess(source: Source, options: PreprocessOptions) -> dict:
    """Write the shards of `source`; returns the manifest, with "already_complete" where nothing was to do.

    One of several tasks writes no manifest: the result is {"accounts": ..} of its parts; that of stage hash is empty.
    Raises ValueError when the folder holds something else, or when too many inputs are unusable.
    """
    load = options.load_tokenizers or load_on("cpu")
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
            _run_parts(hash_part, "hash", source, options)
            if options.stage == "hash":
                return {}
        if options.deduplicate:
            _require_hashes(options.output / WORK, source.parts)
            find_duplicates(options.output / WORK, source.parts, options.deduplicate)
        account = _run_parts(work_on_part, "preprocess", source, options)
        if options.tasks > 1:
            return {"accounts": account.to_dict()}
        return finish(options.output, {**plan, "about": about})


def _make_plan(source: Source, options: PreprocessOptions, vocabulary: str) -> dict:
    """What the bytes of the shards depend on."""
    chosen = {**options.filters.to_dict(), "deduplicate": sorted(options.deduplicate)}
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
            f"{len(missing)} of {parts} parts have no hashes yet, such as part {missing[0]}; run every task with "
            f"--stage hash to its end first."
        )


def _prepare_folder(options: PreprocessOptions, plan: dict, about: dict) -> dict | None:
    """Make the folder ready for this plan; returns the manifest if it already holds what is asked for."""
    output, work = options.output, options.output / WORK
    found, recorded = {}, plan
    names = sorted(path.name for path in output.iterdir() if path.name != WORK)
    if not (output / MANIFEST).is_file() and not (work / "plan.json").is_file():
        if names:
            raise ValueError(
                f"--output {output} holds other files ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}) and "
                f"no shards of this tool; give a new or empty folder."
            )
    elif options.overwrite:
        write_json(work / "plan.json", {**plan, "about": about})  # first: what an interruption leaves is known as ours
        _remove_shards(output)
    elif (output / MANIFEST).is_file():
        found = open_shards(output).manifest  # also refuses damaged files
        recorded = found.get("options", {})
    else:
        recorded = json.loads((work / "plan.json").read_text())
    differing = list(_compare_plans(recorded, plan))
    if differing:
        raise ValueError(
            f"--output {output} holds shards made with other options ({'; '.join(differing)}). Give another "
            f"folder, or replace these shards with --overwrite."
        )
    if found:
        return found
    work.mkdir(exist_ok=True)
    if options.tasks == 1:  # nobody else is at work
        for path in [*work.glob("*.tmp"), *work.glob(".*.tmp")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(work / "plan.json", {**plan, "about": about})
    return None


def _compare_plans(recorded: dict, plan: dict) -> Iterator[str]:
    recorded = {**_DEFAULTS, **recorded, "device": str(recorded.get("device")).split(":")[0]}
    for name, value in {**_DEFAULTS, **plan}.items():
        if recorded.get(name) != value:
            what = "the input has changed, or is another: " if name == "input_sha256" else ""
            yield f"{what}{name}: {recorded.get(name)}, now {value}"


def _remove_shards(output: Path) -> None:
    """Remove what this tool writes, the manifest first, and nothing else."""
    work = output / WORK
    shards = [path for path in output.glob("shard-*") if path.name.endswith((".tar", ".idx.npy", ".parquet"))]
    notes = [*work.glob("part-*.json"), *work.glob("*.npy")]
    for path in (output / MANIFEST, output / QUARANTINE, *notes, *shards):
        path.unlink(missing_ok=True)


def _run_parts(work: Callable[[int], dict], label: str, source: Source, options: PreprocessOptions) -> Account:
    """Do `work` on all parts of this task; stops as soon as too many inputs are unusable."""
    context = multiprocessing.get_context("spawn")
    shared = Shared(context.Value("q", 0), context.Value("b", 0), context.Value("i", 0))
    task = Task(
        source, options.output, options.batch_size, options.filters, options.device, options.tokenizer,
        options.load_tokenizers, bool(options.deduplicate),
    )  # fmt: skip
    parts = range(options.task, source.parts, options.tasks)
    sizes = [source.part_inputs(part) for part in parts]
    total = None if None in sizes else sum(sizes)
    with meter(total, label, "inputs") as progress:
        if options.workers <= 1 or len(parts) <= 1:
            threads = torch.get_num_threads()
            begin_work(task, shared, progress)
            try:
                return _collect(map(work, parts), len(parts), total, options, shared)
            finally:
                torch.set_num_threads(threads)
        with ProcessPoolExecutor(min(options.workers, len(parts)), context, begin_work, (task, shared)) as pool:
            try:
                futures = [pool.submit(work, part) for part in parts]
                return _collect(_completed(futures, shared, progress), len(parts), total, options, shared)
            except BrokenProcessPool as error:
                raise OSError(
                    "a worker process was killed (often for want of memory); lower --workers or --batch-size and "
                    "run the same command again: parts that are whole are kept."
                ) from error
            finally:
                shared.stop.value = 1
                pool.shutdown(cancel_futures=True)


def _completed(futures: list[Future], shared: Shared, progress: Meter) -> Iterator[dict]:
    """Results as they arrive, with the workers' counts shown in between."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
        progress.advance(shared.done.value - progress.done)
        for future in done:
            yield future.result()
    progress.advance(shared.done.value - progress.done)


def _collect(
    results: Iterable[dict], parts: int, total: int | None, options: PreprocessOptions, shared: Shared
) -> Account:
    """Add up what was done; ValueError once more inputs are unusable than the rest of all tasks can make good."""
    account, read = Account(), 0
    for done, counts in enumerate(results, 1):
        account.add(counts)
        read += counts["read"]
        # Where inputs cannot be counted ahead, the other parts and tasks are taken to be as these are.
        whole = options.tasks * (total or read * parts / done)
        if account.quarantined > options.max_bad_fraction * whole:
            shared.stop.value = 1
            _write_known_quarantine(options.output)
            check_bad_share(account.quarantined, account.read, options.max_bad_fraction, options.output, whole)
    if options.tasks > 1:
        _write_known_quarantine(options.output)
        if account.quarantined > options.max_bad_fraction * read:
            logger.warning(
                "%d of the %d inputs of this task are unusable, more than --max-bad-fraction %g of them: merge will "
                "refuse the shards if the other tasks do not make it good.",
                account.quarantined, read, options.max_bad_fraction,
            )  # fmt: skip
    return account


def _write_known_quarantine(output: Path) -> None:
    """List what the finished parts of all tasks have quarantined."""
    write_quarantine(output, sorted((output / WORK).glob(record_path(Path(), 0).name.replace("000000", "*"))))
