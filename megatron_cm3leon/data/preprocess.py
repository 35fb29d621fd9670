"""Preprocessing: raw pairs -> tokenised shards, by several processes, with an account of every input.

The input is cut into fixed parts, each part is encoded by one process in fixed batches with one thread:
the bytes of the shards depend on input, tokenizers, part size, batch size and device alone. A part's files are
written under a temporary name and renamed when whole; its record in `.work/` follows them; the manifest
is written last. A run that was interrupted is finished by the same command: whole parts are kept.
"""

import fcntl
import functools
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_cm3leon.data.parts import WORK, Shared, Task, begin_work, work_on_part
from megatron_cm3leon.data.shards import MANIFEST, build_manifest, open_shards, write_json
from megatron_cm3leon.data.sources import FolderSource, JsonlSource
from megatron_cm3leon.progress import Meter, meter

QUARANTINE = "quarantine.jsonl"
_POLL_SECONDS = 0.5


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
    """Where the image tokenizer computes."""
    max_bad_fraction: float = 0.01
    """Largest share of unusable inputs."""
    overwrite: bool = False
    """Replace shards that were made with other options."""
    command: str = ""
    """Command line, for the manifest."""
    load_tokenizers: Callable | None = None
    """Loads the tokenizer folder; None is tokenizers.folder.Tokenizers.load."""


@dataclass
class Account:
    """Every input is either written or quarantined."""

    written: int = 0
    quarantined: int = 0
    reasons: Counter = field(default_factory=Counter)

    @property
    def read(self) -> int:
        return self.written + self.quarantined

    def to_dict(self) -> dict:
        fields = {"read": self.read, "written": self.written, "quarantined": self.quarantined}
        return {**fields, "reasons": dict(sorted(self.reasons.items()))}


def preprocess(source: JsonlSource | FolderSource, options: PreprocessOptions) -> dict:
    """Write the shards of `source`; returns the manifest, with "already_complete" where nothing was to do.

    Raises ValueError when the folder holds something else, or when too many inputs are unusable.
    """
    if options.load_tokenizers is None:
        from megatron_cm3leon.tokenizers.folder import Tokenizers

        options.load_tokenizers = functools.partial(Tokenizers.load, device=options.device)
    tokenizers = options.load_tokenizers(options.tokenizer)
    plan = {
        "input_sha256": source.identity,
        "vocabulary": tokenizers.vocabulary.hash,
        "part_size": source.part_size,
        "batch_size": options.batch_size,
        "device": options.device,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    with _lock(options.output):
        complete = _prepare_folder(options, plan)
        if complete:
            _check_account(complete["accounts"]["quarantined"], complete["accounts"]["read"], options)
            return {**complete, "already_complete": True}
        records = _run_parts(source, options)
        return _finish(source, options, plan, tokenizers, records)


def _prepare_folder(options: PreprocessOptions, plan: dict) -> dict | None:
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
        write_json(work / "plan.json", plan)  # first: what an interruption leaves must be known as ours
        _remove_shards(output)
    elif (output / MANIFEST).is_file():
        found = open_shards(output).manifest  # also refuses damaged files
        recorded = found.get("options", {})
    else:
        recorded = json.loads((work / "plan.json").read_text())
    differing = [
        f"{name}: {recorded.get(name)}, now {value}" for name, value in plan.items() if recorded.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"--output {output} holds shards made with other options ({'; '.join(differing)}). Give another "
            f"folder, or replace these shards with --overwrite."
        )
    if found:
        return found
    work.mkdir(exist_ok=True)
    for path in work.glob("*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(work / "plan.json", plan)
    return None


def _remove_shards(output: Path) -> None:
    """Remove what this tool writes, the manifest first, and nothing else."""
    shards = [path for path in output.glob("shard-*") if path.name.endswith((".tar", ".idx.npy", ".parquet"))]
    for path in (output / MANIFEST, output / QUARANTINE, *(output / WORK).glob("part-*.json"), *shards):
        path.unlink(missing_ok=True)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """One run at a time in a folder; the lock goes with the process."""
    work = output / WORK
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing --output {output}; wait for it or end it.") from error
        try:
            yield
        finally:
            if (output / MANIFEST).is_file() or not (work / "plan.json").is_file():
                shutil.rmtree(work)


def _run_parts(source: JsonlSource | FolderSource, options: PreprocessOptions) -> list[dict]:
    """Records of all parts, in order; stops as soon as too many inputs are unusable."""
    context = multiprocessing.get_context("spawn")
    shared = Shared(context.Value("q", 0), context.Value("b", 0))
    task = Task(source, options.output, options.batch_size)
    beginning = (task, shared, options.load_tokenizers, options.tokenizer)
    with meter(source.count, "preprocess", "pairs") as progress:
        if options.workers <= 1:
            threads = torch.get_num_threads()
            begin_work(*beginning, progress)
            try:
                return _collect(map(work_on_part, range(source.parts)), source, options, shared)
            finally:
                torch.set_num_threads(threads)
        workers = min(options.workers, source.parts)
        with ProcessPoolExecutor(workers, context, begin_work, beginning) as pool:
            try:
                futures = [pool.submit(work_on_part, part) for part in range(source.parts)]
                return _collect(_completed(futures, shared, progress), source, options, shared)
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
    results: Iterable[dict], source: JsonlSource | FolderSource, options: PreprocessOptions, shared: Shared
) -> list[dict]:
    records, bad = {}, 0
    for record in results:
        records[record["part"]] = record
        bad += len(record["quarantine"])
        if bad > options.max_bad_fraction * source.count:  # no later part can mend this
            shared.stop.value = 1
            _write_quarantine(options.output, records)
            _check_account(bad, sum(r["read"] for r in records.values()), options, source.count)
    return [records[part] for part in range(source.parts)]


def _check_account(bad: int, read: int, options: PreprocessOptions, total: int | None = None) -> None:
    if bad <= options.max_bad_fraction * (total or read):
        return
    raise ValueError(
        f"{bad} of the {read} inputs read are unusable, more than --max-bad-fraction {options.max_bad_fraction:g} "
        f"allows; {options.output / QUARANTINE} names each with its reason. Mend them, or raise --max-bad-fraction; "
        f"then run the same command again: parts that are whole are kept."
    )


def _write_quarantine(output: Path, records: dict[int, dict]) -> None:
    temporary = output / WORK / f"{QUARANTINE}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        for part in sorted(records):
            file.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in records[part]["quarantine"])
    os.replace(temporary, output / QUARANTINE)


def _finish(source, options: PreprocessOptions, plan: dict, tokenizers, records: list[dict]) -> dict:
    """Check the account, then write quarantine list and manifest."""
    account = Account()
    for record in records:
        account.written += sum(shard["documents"] for shard in record["shards"])
        account.quarantined += len(record["quarantine"])
        account.reasons.update(bad["reason"].split(":")[0] for bad in record["quarantine"])
    assert account.read == sum(record["read"] for record in records), "an input was neither written nor quarantined"
    _write_quarantine(options.output, dict(enumerate(records)))
    _check_account(account.quarantined, account.read, options)
    if not account.written:
        raise ValueError(f"none of the {account.read} inputs is usable; see {options.output / QUARANTINE}.")
    manifest = build_manifest(
        tokenizers.vocabulary,
        [shard for record in records for shard in record["shards"]],
        image_size=tokenizers.image.image_size,
        input=str(source.folder),
        accounts=account.to_dict(),
        command=options.command,
        options={**plan, "max_bad_fraction": options.max_bad_fraction, "workers": options.workers},
    )
    write_json(options.output / MANIFEST, manifest)
    return manifest
