"""What the encoder sees of a document: its text, its images, and hashes by which equal images are found.

A pair has a caption and an image. A text has no image. An interleaved document has its texts, concatenated, and all
its images. Texts that the metadata do not hold are decoded from the ids, which requires the tokenizer.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_cm3leon.data.shards.reader import Corpus, split_segments

READERS = 8
"""Threads that read and decode images."""
MAX_IMAGES = 16
"""Images of a document that are compared with those of others; further ones are not compared."""
_COLUMNS = ("key", "caption", "image", "picture_sha256")


@dataclass
class Content:
    """One document."""

    number: int
    """Number of the document in its corpus."""
    name: str
    """How messages call the document."""
    text: str
    image_codes: list[np.ndarray]
    """Codes of each image, int64 [image tokens]."""
    image_files: list[str]
    """File name of each image that the metadata name."""
    image_sha256: list[str]
    """Checksum of each of these files, hexadecimal."""


ReadImages = Callable[[Content], list[Image.Image]]
"""Returns all images of a document as RGB."""


class ContentReader:
    """Reads documents of a corpus; fast in the order of their numbers."""

    def __init__(self, corpus: Corpus, decode_text: Callable[[list[int]], str] | None = None) -> None:
        """`decode_text` returns the text of ids; None if there is no tokenizer."""
        self.corpus, self.decode_text = corpus, decode_text
        self.shard_starts = np.cumsum([0, *(shard["documents"] for shard in corpus.shards)])
        """Number of the first document of each shard, and the number of documents."""
        self._shard, self._metadata = -1, pa.table({})

    def read(self, numbers: Sequence[int]) -> list[Content]:
        """Documents by their numbers; ValueError names a document that cannot be read."""
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> Content:
        row, vocabulary = self._read_metadata(number), self.corpus.vocabulary
        texts, codes = [], []
        for ids in split_segments(self.corpus.read(number).astype(np.int64), vocabulary):
            if len(ids) and vocabulary.is_image(int(ids[0])):
                codes.append(ids - vocabulary.image_start)
            elif len(ids):
                texts.append(ids)
        name = f"document {number} ({row['key']}) of {self.corpus.folder}"
        text = row["caption"] or (self._decode(texts, name) if texts else "")
        files, checksums = ((row[column] or "").split("\n") for column in ("image", "picture_sha256"))
        return Content(
            number=number,
            name=name,
            text=text,
            image_codes=codes,
            image_files=list(filter(None, files)),
            image_sha256=list(filter(None, checksums)),
        )

    def _read_metadata(self, number: int) -> dict:
        """Metadata of a document; those of the latest shard are kept."""
        shard = int(np.searchsorted(self.shard_starts, number, "right")) - 1
        if shard != self._shard:
            path = self.corpus.metadata_file(shard)
            self._shard, self._metadata = shard, pq.read_table(path, columns=list(_COLUMNS))
        row = number - int(self.shard_starts[shard])
        return {name: self._metadata.column(name)[row].as_py() for name in _COLUMNS}

    def _decode(self, texts: list[np.ndarray], name: str) -> str:
        if self.decode_text is None:
            raise ValueError(
                f"{name} has text that its metadata do not hold (it is not a pair of a caption and an image); give "
                f"--tokenizer, the folder the shards were made with."
            )
        return " ".join(self.decode_text(ids.tolist()) for ids in texts)


_Batch = tuple[list[Content], list[list[Image.Image]]]


def read_ahead(reader: ContentReader, read_images: ReadImages, batches: Sequence[range]) -> Iterator[_Batch]:
    """Yield (contents, images of each document) for each batch, while the next batch is being read."""
    with ThreadPoolExecutor(READERS) as pool:

        def begin(batch: range) -> tuple[list[Content], list[Future | None]]:
            contents = reader.read(batch)
            return contents, [
                pool.submit(read_images, content) if content.image_codes else None for content in contents
            ]

        following = None
        for batch in [*batches, None]:
            current, following = following, begin(batch) if batch is not None else None
            if current is None:
                continue
            contents, images = current
            try:
                yield contents, [each.result() if each else [] for each in images]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def compute_identities(contents: Sequence[Content]) -> np.ndarray:
    """Hashes of each image, uint64 [documents, P, 2]: 64 bits of its file's sha256, and a hash of its tokens; 0: none.

    Images with the same tokens are the same image to the model. P is the largest number of images of a document, at
    least 1 and at most MAX_IMAGES.
    """
    rows = []
    for content in contents:
        files = [int(sha256[:16], 16) for sha256 in content.image_sha256]
        tokens = [
            int.from_bytes(hashlib.blake2b(codes.astype("<i8").tobytes(), digest_size=8).digest(), "big")
            for codes in content.image_codes
        ]
        rows.append((files[:MAX_IMAGES], tokens[:MAX_IMAGES]))
    widest = max((len(hashes) for row in rows for hashes in row), default=0)
    identities = np.zeros((len(rows), max(1, widest), 2), np.uint64)
    for row, kinds in enumerate(rows):
        for kind, values in enumerate(kinds):
            identities[row, : len(values), kind] = values
    return identities
