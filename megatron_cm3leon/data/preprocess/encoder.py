"""The inputs of one part -> its shards, in fixed batches, and the account of what was not written."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
import torch

from megatron_cm3leon.data.preprocess.dedupe import REASONS, UNKNOWN, checksum
from megatron_cm3leon.data.preprocess.document_reader import (
    NO_TOKEN,
    DocumentReader,
    Loaded,
    describe_document,
    describe_texts,
)
from megatron_cm3leon.data.preprocess.filters import Filters
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.data.sources import BadInput, Entry, Filtered, RawText, RawTexts, Source

SHARD_BYTES = 1 << 30
"""A part whose tar grows beyond this goes on in another shard."""
MOST_WAITING = 1024
"""Documents, most of them without pictures, that wait for a batch of pictures to fill."""


@dataclass
class Task:
    """What every worker is told."""

    source: Source
    output: Path
    batch_size: int
    filters: Filters = field(default_factory=Filters)
    device: str = "cpu"
    tokenizer: Path = Path()
    load_tokenizers: Callable | None = None
    """Loads the tokenizer folder; None is tokenizers.folder.Tokenizers.load on the worker's device."""
    deduplicate: bool = False
    """Whether duplicates.npy says what to leave out."""


class PartEncoder:
    """Turns the inputs of one part into its shards."""

    def __init__(
        self, task: Task, tokenizers, reader: DocumentReader, folder: Path, part: int, dropped: np.ndarray | None,
        advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        """`dropped`: uint8 [inputs], what duplicates.npy says of this part; `advance(n)` is told of n inputs done."""
        self.task, self.tokenizers, self.folder, self.part = task, tokenizers, folder, part
        self.vocabulary, self.reader, self.dropped, self.advance = tokenizers.vocabulary, reader, dropped, advance
        self.shards, self.quarantine, self.left_out, self.kinds = [], [], Counter(), Counter()
        self.read = 0
        self.writer: ShardWriter | None = None
        self.break_bytes = np.array(self.vocabulary.break_id, self.reader.text.dtype).tobytes()

    def run(self) -> dict:
        batch, pictures, documents = [], 0, 0
        for item in self._load_inputs():
            batch.append(item)
            pictures += 0 if isinstance(item, RawTexts) else len(item.pixels)
            documents += len(item) if isinstance(item, RawTexts) else 1
            full = pictures >= self.task.batch_size or documents >= max(MOST_WAITING, self.task.batch_size)
            if full or not pictures:  # without pictures there is nothing to wait for
                self._write(batch, documents)
                batch, pictures, documents = [], 0, 0
        self._write(batch, documents)
        self._close_shard()
        return {
            "part": self.part,
            "read": self.read,
            "shards": self.shards,
            "quarantine": self.quarantine,
            "left_out": dict(sorted(self.left_out.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "dropped": checksum(self.dropped),
        }

    def close(self) -> None:
        """Leave no file open, also when the run failed."""
        if self.writer:
            self.writer.abandon()

    def _load_inputs(self) -> Iterator[Loaded | RawTexts]:
        """What is to be written; everything else is counted here."""
        dropped = self.dropped
        for block in self.task.source.read_blocks(self.part):
            block = block if isinstance(block, RawTexts) else [block]
            first, self.read = self.read, self.read + len(block)
            unknown = dropped is not None and UNKNOWN in dropped[first : self.read]
            if dropped is not None:
                block = self._without(dropped[first : self.read], block)
            if isinstance(block, RawTexts) and not self.task.filters.clean_captions:
                if block:
                    yield block
                continue
            for entry in block:
                loaded = self.reader.read(entry)
                if isinstance(loaded, Loaded):
                    if unknown:
                        raise ValueError(
                            f"{entry.source} was unusable when duplicates were looked for, and no longer is: run the "
                            f"same command again (of several tasks, all with --stage hash before --stage encode)."
                        )
                    yield loaded
                elif isinstance(loaded, Filtered):
                    self._leave_out(loaded.reason)
                else:
                    self.quarantine.append(loaded.to_dict())
                    self.advance(1)
        if dropped is not None and self.read != len(dropped):
            raise ValueError(
                f"part {self.part} of the input has {self.read} inputs, but had {len(dropped)} when duplicates were "
                f"looked for: the input has changed. Start again with --overwrite."
            )

    def _without(self, reasons: np.ndarray, block: RawTexts | list[Entry]) -> RawTexts | list[Entry]:
        """What of a block is no duplicate; `reasons`, uint8 [inputs], are those of duplicates.npy."""
        chosen = (reasons == 0) | (reasons == UNKNOWN)
        for reason in reasons[~chosen].tolist():
            self._leave_out(REASONS[reason])
        return block.choose(chosen) if isinstance(block, RawTexts) else list(compress(block, chosen))

    def _leave_out(self, reason: str) -> None:
        self.left_out[reason] += 1
        self.advance(1)

    def _write(self, batch: list[Loaded | RawTexts], documents: int) -> None:
        """Append what was loaded in its order, `documents` in all."""
        loaded = [item for item in batch if isinstance(item, Loaded)]
        pictures = self._encode_pictures([pixels for item in loaded for pixels in item.pixels])
        for item in batch:
            if isinstance(item, RawTexts):
                self._add_texts(item)
                continue
            texts = iter(item.payloads)
            payloads = [next(texts if isinstance(part, str) else pictures) for part in item.raw.segments]
            self.kinds[item.raw.kind] += 1
            self._open_writer().add_bytes(item.raw.key, self.break_bytes.join(payloads), describe_document(item))
        self.advance(documents)

    def _add_texts(self, texts: RawTexts) -> None:
        """Append texts as `_write` would one after the other, at a fraction of the cost."""
        payloads = self.reader.text.encode_many(texts.texts)
        if not all(payloads):  # a text model that normalises drops some characters
            empty = texts.choose([not ids for ids in payloads])
            self.quarantine += [BadInput(text.key, text.source, NO_TOKEN).to_dict() for text in empty]
            texts, payloads = texts.choose(list(map(bool, payloads))), list(filter(None, payloads))
            if not texts:
                return
        self.kinds[RawText.kind] += len(texts)
        self._open_writer().add_many(texts.keys, payloads, describe_texts(texts))

    def _open_writer(self) -> ShardWriter:
        """The shard that the next documents go to."""
        if self.writer and self.writer.bytes > SHARD_BYTES:
            self._close_shard()
        if not self.writer:
            name = f"shard-{self.part:06d}-{len(self.shards):03d}"
            self.writer = ShardWriter(self.folder, name, self.vocabulary)
        return self.writer

    @torch.no_grad()
    def _encode_pictures(self, pixels: list[torch.Tensor]) -> Iterator[bytes]:
        """Ids of each picture as bytes, encoded in batches."""
        for start in range(0, len(pixels), self.task.batch_size):
            chosen = pixels[start : start + self.task.batch_size]
            codes = self.tokenizers.image.encode(torch.stack(chosen))
            assert codes.shape == (len(chosen), self.vocabulary.image_tokens), f"the image tokenizer gave {codes.shape}"
            ids = (codes.cpu().numpy() + self.vocabulary.image_start).astype(self.reader.text.dtype)
            yield from (row.tobytes() for row in ids)

    def _close_shard(self) -> None:
        if self.writer:
            self.shards.append(self.writer.close())
            self.writer = None
