"""Verification of a checkpoint's checksums during loading, shared among the ranks of a node.

On loading, every file that the ranks of a node read is hashed once on that node, by one of its ranks, in threads
parallel to the reading: the bytes come from the disk once, and the second reader finds them in the page cache.
"""

import os
import platform
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_cm3leon.checkpoint.format import (
    CheckpointFolder,
    damage_error,
)
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.distributed.launch import gather_objects
from megatron_cm3leon.model.weights import Placement
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

Gather = Callable[[object], list]
"""All-gather of objects: returns on every rank the list of the values of all ranks, in the order of the ranks."""


def gather_single(value: object) -> list:
    """All-gather of a single process."""
    return [value]


@contextmanager
def verify_while_reading(
    reader: CheckpointFolder, files: Iterable[str], gather: Gather = gather_single
) -> Iterator[None]:
    """Hash `files`, those that the body reads, in threads while the body runs; collective on entry and on exit.

    On exit every rank raises ValueError when a file is damaged or the body failed on any rank, so that all ranks stop
    together. Damage is reported before other errors, because it may have caused them.
    """
    required = set(files)
    share, peers = _divide_files(reader, required, gather)
    reader.checked |= required
    failure: Exception | None = None
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // peers)) as pool:
        checks = pool.map(reader.find_damage, share)
        try:
            yield
        except Exception as error:
            failure = error
        problems = [problem for problem in checks if problem]
    outcomes = gather((problems[0] if problems else "", str(failure) if failure else ""))
    for problem, _ in outcomes:
        if problem:
            raise damage_error(reader.folder, problem) from failure
    if failure:
        raise failure
    for _, message in outcomes:
        if message:
            raise ValueError(message)


def _divide_files(reader: CheckpointFolder, files: set[str], gather: Gather) -> tuple[list[str], int]:
    """(files that this rank hashes, number of ranks on its node), of the files that the ranks of its node read."""
    node, identity = platform.node(), uuid.uuid4().hex
    peers = [(rank, needed) for host, rank, needed in gather((node, identity, sorted(files))) if host == node]
    union = sorted(set().union(*(needed for _, needed in peers)))
    union.sort(key=lambda name: -reader.manifest["files"][name]["bytes"])
    index = [rank for rank, _ in peers].index(identity)
    return union[index :: len(peers)], len(peers)


@contextmanager
def open_verified(folder: Path, vocabulary: Vocabulary, placements: list[Placement]) -> Iterator[CheckpointReader]:
    """Open a checkpoint and verify the files of `placements` while the body reads them; collective.

    Raises ValueError on every rank for another vocabulary, for a parameter of `placements` that is missing or has
    another shape, and on exit for a damaged file.
    """
    reader = CheckpointReader(folder)
    check_same_vocabulary(vocabulary, reader.vocabulary, f"checkpoint {folder}")
    files = reader.list_files([(each.name, each.offset, each.local_shape) for each in placements])
    with verify_while_reading(reader, files, gather_objects):
        reader.check_parameters({each.name: each.shape for each in placements})
        yield reader
