"""Checksums of a checkpoint: while it is loaded, shared among the ranks of a node, and for tools/checkpoint.py.

On loading, every file behind what the ranks of one node read is hashed once on that node, by one of its ranks, in
threads beside the reading: the bytes come from the disk once, and the second reader finds them in the page cache.
"""

import os
import platform
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_cm3leon.checkpoint.format import CheckpointFolder, content_damage, damaged, offer_previous, read_manifest
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.distributed.launch import gather_objects
from megatron_cm3leon.model.builder import Placement
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

Gather = Callable[[object], list]
"""Gives every rank the list of what each rank put in, in the order of the ranks."""


def gather_alone(value: object) -> list:
    """The gathering of a single process."""
    return [value]


@contextmanager
def verified(reader: CheckpointFolder, files: Iterable[str], gather: Gather = gather_alone) -> Iterator[None]:
    """Hash `files`, those that the body reads, beside it; every rank enters and leaves at the same place.

    At the end ValueError on every rank when a file is damaged or the body failed on any rank: all of them stop
    together instead of waiting for one that is gone. Damage goes before other errors, which it may have caused.
    """
    files = set(files)
    share, peers = _share(reader, files, gather)
    reader.checked |= files
    failure: Exception | None = None
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // peers)) as pool:
        checks = pool.map(reader.damage, share)
        try:
            yield
        except Exception as error:
            failure = error
        found = [what for what in checks if what]
    failures = gather((found[0] if found else "", str(failure) if failure else ""))
    for what, _ in failures:
        if what:
            raise damaged(reader.folder, what) from failure
    if failure:
        raise failure
    for _, message in failures:
        if message:
            raise ValueError(message)


def _share(reader: CheckpointFolder, files: set[str], gather: Gather) -> tuple[list[str], int]:
    """Which files this rank hashes, of those that the ranks of its node read; and how many ranks those are."""
    node, own = platform.node(), uuid.uuid4().hex
    peers = [(rank, needed) for host, rank, needed in gather((node, own, sorted(files))) if host == node]
    union = sorted(set().union(*(needed for _, needed in peers)))
    union.sort(key=lambda name: -reader.manifest["files"][name]["bytes"])
    place = [rank for rank, _ in peers].index(own)
    return union[place :: len(peers)], len(peers)


def find_damage(folder: Path, report: Callable[[int], None] = lambda size: None, threads: int = 0) -> list[str]:
    """Everything that is wrong with a checkpoint, one sentence each; `report` is told the bytes read, in any thread.

    `threads` files are read at once; 0 takes every core.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        files = manifest["files"].items()
        found = [what for what in pool.map(lambda file: content_damage(folder, *file, report), files) if what]
    if not found:
        try:
            found = [what] if (what := CheckpointFolder(folder).missing_numbers()) else []
        except ValueError as error:
            return [str(error)]
    sentences = [f"checkpoint {folder} is damaged: {what}." for what in found]
    return [*sentences[:-1], sentences[-1] + offer_previous(folder)] if sentences else []


@contextmanager
def open_verified(folder: Path, vocabulary: Vocabulary, places: list[Placement]) -> Iterator[CheckpointReader]:
    """A checkpoint's reader while its files are compared with their SHA-256; collective.

    Raises ValueError on every rank for another vocabulary, for a parameter of `places` that is missing or of another
    shape, and at the end for a damaged file.
    """
    reader = CheckpointReader(folder)
    check_same_vocabulary(vocabulary, reader.vocabulary, f"checkpoint {folder}")
    files = reader.files_of([(place.name, place.offset, place.local_shape) for place in places])
    with verified(reader, files, gather_objects):
        reader.check_parameters({place.name: place.shape for place in places})
        yield reader
