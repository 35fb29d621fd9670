"""Targets of instruction documents: the file `<shard>.targets.npy`, which only shards with such documents have.

    document u4   number of the document within the shard
    start, end u4 tokens [start, end) of the document, <break>s counted, that the model is tuned to write
    image u1      1: the range is image codes; 0: text

Rows are in the order of documents and tokens. A range is not empty, holds no <break>, lies within one segment, and
does not overlap another one. A document without a row is pre-training data: all of its tokens are trained on.
"""

from collections.abc import Iterable
from pathlib import Path
from tokenize import TokenError

import numpy as np

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.tokenizers.vocab import Vocabulary

TARGETS_DTYPE = np.dtype([("document", "<u4"), ("start", "<u4"), ("end", "<u4"), ("image", "u1")])
TARGETS_ENDING = ".targets.npy"


def describe_targets(
    key: str, ids: np.ndarray, targets: Iterable[tuple[int, int]], document: int, vocabulary: Vocabulary
) -> np.ndarray:
    """Rows of the targets (start, end) of the document `ids` [tokens], which is `document` of its shard.

    Raises ValueError, with the key of the document, for a range that is not valid.
    """
    ranges = list(targets)
    rows = np.zeros(len(ranges), TARGETS_DTYPE)
    last = 0
    for row, (start, end) in zip(rows, ranges, strict=True):
        what = f"target {start}..{end} of document {key}, which has {len(ids)} tokens,"
        if not last <= start < end <= len(ids):
            raise ValueError(f"{what} must be a range within the document, not empty, and after the target before it.")
        codes = vocabulary.is_image(ids[start:end])
        if not (codes.all() or vocabulary.is_text(ids[start:end]).all()):
            raise ValueError(f"{what} must be a part of one text or of one image, without <break>.")
        row["document"], row["start"], row["end"], row["image"] = document, start, end, codes[0]
        last = end
    return rows


def load_targets(path: Path, sha256: str, lengths: np.ndarray) -> np.ndarray:
    """The rows of a file, after checking its SHA-256 and every range; `lengths`: tokens of the shard's documents.

    Raises ValueError with what is wrong, for a message about the shards' folder.
    """
    if sha256_file(path) != sha256:
        raise ValueError(f"{path.name} is damaged, it does not match its SHA-256")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, SyntaxError, TokenError, EOFError) as error:  # raised by numpy for a damaged header
        raise ValueError(f"{path.name} is unreadable ({error})") from error
    if rows.dtype != TARGETS_DTYPE or rows.ndim != 1 or not len(rows):
        raise ValueError(f"{path.name} is not a list of targets (document, start, end, image)")
    documents, starts, ends = (rows[name].astype(np.int64) for name in ("document", "start", "end"))
    if documents.max() >= len(lengths):
        raise ValueError(f"{path.name} has a target of document {documents.max()}, but the shard has {len(lengths)}")
    outside = np.flatnonzero((starts >= ends) | (ends > lengths[documents]))
    if len(outside):
        raise ValueError(
            f"{path.name} has {_name_target(rows[outside[0]])}, which has {lengths[documents[outside[0]]]}"
        )
    same = documents[1:] == documents[:-1]
    unsorted = np.flatnonzero((documents[1:] < documents[:-1]) | (same & (starts[1:] < ends[:-1])))
    if len(unsorted):
        raise ValueError(
            f"{path.name} has {_name_target(rows[unsorted[0] + 1])} after {_name_target(rows[unsorted[0]])}: targets "
            f"must be sorted and must not overlap"
        )
    return rows


def _name_target(row: np.void) -> str:
    return f"target {row['start']}..{row['end']} of document {row['document']}"
