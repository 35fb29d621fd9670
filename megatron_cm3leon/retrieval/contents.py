"""What of a document the encoder sees: its text, its pictures, and what makes two pictures the same.

A pair has its caption and its picture. A text has no picture. An interleaved document has its texts, one behind the
other, and all its pictures. Texts that the metadata do not keep are decoded from the ids, which needs the tokenizer.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from megatron_cm3leon.data.shards.reader import Corpus, split_segments

READERS = 8
"""Threads that read and decode pictures."""
MOST_PICTURES = 16
"""Pictures of a document that are compared with others'; those behind them are not."""
_COLUMNS = ("key", "caption", "image", "picture_sha256")


@dataclass
class Content:
    """One document."""

    number: int
    name: str
    """The document for messages."""
    text: str
    codes: list[np.ndarray]
    """Codes of its pictures."""
    image: list[str]
    """Names of its pictures' files, as far as the metadata have them."""
    sha256: list[str]
    """Checksums of its pictures' files."""


ReadPictures = Callable[[Content], list[Image.Image]]
"""All pictures of a document as RGB."""


class ContentReader:
    """Reads documents of a corpus in the order of their numbers; pictures by several threads."""

    def __init__(self, corpus: Corpus, decode_text: Callable[[list[int]], str] | None = None) -> None:
        """`decode_text` gives the text of ids; None where there is no tokenizer."""
        self.corpus, self.decode_text = corpus, decode_text
        self.starts = np.cumsum([0, *(shard["documents"] for shard in corpus.shards)])
        self._shard, self._rows = -1, None

    def read(self, numbers: Sequence[int]) -> list[Content]:
        """Documents by their numbers; ValueError names one that cannot be read."""
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> Content:
        row, vocabulary = self._read_row(number), self.corpus.vocabulary
        texts, codes = [], []
        for ids in split_segments(self.corpus.read(number).astype(np.int64), vocabulary):
            if len(ids) and vocabulary.is_image(int(ids[0])):
                codes.append(ids - vocabulary.image_start)
            elif len(ids):
                texts.append(ids)
        name = f"document {number} ({row['key']}) of {self.corpus.folder}"
        text = row["caption"] or (self._decode(texts, name) if texts else "")
        files, checksums = ((row[column] or "").split("\n") for column in ("image", "picture_sha256"))
        return Content(number, name, text, codes, list(filter(None, files)), list(filter(None, checksums)))

    def _read_row(self, number: int) -> dict:
        """Metadata of a document; those of one shard are held at a time."""
        shard = int(np.searchsorted(self.starts, number, "right")) - 1
        if shard != self._shard:
            path = self.corpus.metadata_file(shard)
            self._shard, self._rows = shard, pq.read_table(path, columns=list(_COLUMNS))
        row = number - int(self.starts[shard])
        return {name: self._rows.column(name)[row].as_py() for name in _COLUMNS}

    def _decode(self, texts: list[np.ndarray], name: str) -> str:
        if self.decode_text is None:
            raise ValueError(
                f"{name} has text that its metadata do not hold (it is no pair of a caption and a picture); give "
                f"--tokenizer, the folder the shards were made with."
            )
        return " ".join(self.decode_text(ids.tolist()) for ids in texts)


def read_ahead(reader: ContentReader, read_pictures: ReadPictures, batches: Sequence[range]):
    """Yield (contents, pictures of each) for each batch; the next one is read meanwhile."""
    with ThreadPoolExecutor(READERS) as pool:

        def begin(batch: range):
            contents = reader.read(batch)
            return contents, [pool.submit(read_pictures, content) if content.codes else None for content in contents]

        waiting = begin(batches[0]) if batches else None
        for following in [*batches[1:], None]:
            contents, pictures = waiting
            waiting = begin(following) if following is not None else None
            try:
                yield contents, [picture.result() if picture else [] for picture in pictures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def compute_identities(contents: Sequence[Content]) -> np.ndarray:
    """uint64 [documents, P, 2]: of each picture 64 bits of its file's sha256, and a hash of its tokens; 0: none.

    Pictures that the image tokenizer cannot tell apart are the same picture to the model. P is 1, or as many pictures
    as a document has, at most MOST_PICTURES.
    """
    rows = []
    for content in contents:
        files = [int(sha256[:16], 16) for sha256 in content.sha256]
        tokens = [hashlib.blake2b(codes.astype("<i8").tobytes(), digest_size=8).digest() for codes in content.codes]
        rows.append((files[:MOST_PICTURES], [int.from_bytes(token, "big") for token in tokens[:MOST_PICTURES]]))
    widest = max((len(part) for row in rows for part in row), default=0)
    identities = np.zeros((len(rows), max(1, widest), 2), np.uint64)
    for row, parts in enumerate(rows):
        for kind, hashes in enumerate(parts):
            identities[row, : len(hashes), kind] = hashes
    return identities
