"""The inputs of one part -> its shards, encoded in fixed batches, with counts of the inputs not written."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

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
from megatron_cm3leon.data.sources import BadInput, Entry, Filtered, RawInstruction, RawText, RawTexts, Source
from megatron_cm3leon.data.sources.documents import TARGET

SHARD_BYTES = 1 << 30
"""A part whose tar grows beyond this continues in another shard."""
MAX_WAITING = 1024
"""Documents, most of them without images, that wait until a batch of images is full."""

LoadTokenizers = Callable[[Path], Any]
"""Loads a tokenizer folder: tokenizers.folder.Tokenizers, or an object with its `text`, `image` and `vocabulary`."""


@dataclass
class WorkerSettings:
    """Input, output and options of every worker."""

    source: Source
    output: Path
    batch_size: int
    filters: Filters = field(default_factory=Filters)
    device: str = "cpu"
    tokenizer: Path = Path()
    load_tokenizers: LoadTokenizers | None = None
    """None: tokenizers.folder.Tokenizers.load on the worker's device."""
    deduplicate: bool = False
    """Whether the inputs marked in duplicates.npy are skipped."""


class PartEncoder:
    """Turns the inputs of one part into its shards."""

    def __init__(
        self, settings: WorkerSettings, tokenizers, reader: DocumentReader, folder: Path, part: int,
        dropped: np.ndarray | None, advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        """`dropped`: uint8 [inputs], the part's rows of duplicates.npy; `advance(n)` is called after n more inputs."""
        self.settings, self.tokenizers, self.folder, self.part = settings, tokenizers, folder, part
        self.vocabulary, self.reader, self.dropped, self.advance = tokenizers.vocabulary, reader, dropped, advance
        self.shards: list[dict] = []
        self.quarantine: list[dict] = []
        self.left_out: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.read = 0
        self.writer: ShardWriter | None = None
        self.break_bytes = np.array(self.vocabulary.break_id, self.reader.text.dtype).tobytes()

    def run(self) -> dict:
        """Write the shards; returns the part's record."""
        batch: list[Loaded | RawTexts] = []
        images = documents = 0
        batch_size = self.settings.batch_size
        for item in self._load_inputs():
            batch.append(item)
            images += 0 if isinstance(item, RawTexts) else len(item.pixels)
            documents += len(item) if isinstance(item, RawTexts) else 1
            full = images >= batch_size or documents >= max(MAX_WAITING, batch_size)
            if full or not images:  # without images there is no batch to fill
                self._write(batch, documents)
                batch, images, documents = [], 0, 0
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
        """Close the open file, if any, also when the run failed."""
        if self.writer:
            self.writer.abandon()

    def _load_inputs(self) -> Iterator[Loaded | RawTexts]:
        """The inputs to write; all others are counted here."""
        dropped = self.dropped
        for item in self.settings.source.read_batches(self.part):
            entries: RawTexts | list[Entry] = item if isinstance(item, RawTexts) else [item]
            first, self.read = self.read, self.read + len(entries)
            unknown = dropped is not None and UNKNOWN in dropped[first : self.read]
            if dropped is not None:
                entries = self._remove_duplicates(dropped[first : self.read], entries)
            if isinstance(entries, RawTexts) and not self.settings.filters.clean_captions:
                if entries:
                    yield entries
                continue
            for entry in entries:
                loaded = self.reader.read(entry)
                if isinstance(loaded, Loaded):
                    if unknown:
                        raise ValueError(
                            f"{loaded.raw.source} was unusable when the duplicates were determined, and is usable now: "
                            f"run the same command again (with several tasks: --stage hash on all of them before "
                            f"--stage encode)."
                        )
                    yield loaded
                elif isinstance(loaded, Filtered):
                    self._skip(loaded.reason)
                else:
                    self.quarantine.append(loaded.to_dict())
                    self.advance(1)
        if dropped is not None and self.read != len(dropped):
            raise ValueError(
                f"part {self.part} of the input has {self.read} inputs, but had {len(dropped)} when the duplicates "
                f"were determined: the input has changed. Start again with --overwrite."
            )

    def _remove_duplicates(self, reasons: np.ndarray, entries: RawTexts | list[Entry]) -> RawTexts | list[Entry]:
        """The entries that are not duplicates; `reasons`, uint8 [inputs], as in duplicates.npy."""
        chosen = (reasons == 0) | (reasons == UNKNOWN)
        for reason in reasons[~chosen].tolist():
            self._skip(REASONS[reason])
        return entries.choose(chosen) if isinstance(entries, RawTexts) else list(compress(entries, chosen))

    def _skip(self, reason: str) -> None:
        self.left_out[reason] += 1
        self.advance(1)

    def _write(self, batch: list[Loaded | RawTexts], documents: int) -> None:
        """Append the batch in its order; `documents`: documents in it."""
        loaded = [item for item in batch if isinstance(item, Loaded)]
        images = self._encode_images([pixels for item in loaded for pixels in item.pixels])
        for item in batch:
            if isinstance(item, RawTexts):
                self._add_texts(item)
                continue
            texts = iter(item.payloads)
            payloads = [next(texts if isinstance(part, str) else images) for part in item.raw.segments]
            self.kinds[item.raw.kind] += 1
            if isinstance(item.raw, RawInstruction):
                payload, targets = self._join_pieces(item.raw, payloads)
                self._open_writer().add_bytes(item.raw.key, payload, describe_document(item), targets=targets)
            else:
                self._open_writer().add_bytes(item.raw.key, self.break_bytes.join(payloads), describe_document(item))
        self.advance(documents)

    def _join_pieces(self, document: RawInstruction, payloads: list[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
        """The ids of a document with a <break> before each piece that is not joined, and its targets [start, end)."""
        content, targets = b"", []
        for number, payload in enumerate(payloads):
            if number and not document.joined[number]:
                content += self.break_bytes
            start = len(content)
            content += payload
            if document.roles[number] == TARGET:
                size = len(self.break_bytes)
                targets.append((start // size, len(content) // size))
        return content, targets

    def _add_texts(self, texts: RawTexts) -> None:
        """Append texts; the same result as `_write` for each of them, at a fraction of the cost."""
        payloads = self.reader.text.encode_many(texts.texts)
        if not all(payloads):  # a text model that normalizes drops some characters
            empty = texts.choose([not ids for ids in payloads])
            self.quarantine += [BadInput(text.key, text.source, NO_TOKEN).to_dict() for text in empty]
            texts, payloads = texts.choose(list(map(bool, payloads))), list(filter(None, payloads))
            if not texts:
                return
        self.kinds[RawText.kind] += len(texts)
        self._open_writer().add_many(texts.keys, payloads, describe_texts(texts))

    def _open_writer(self) -> ShardWriter:
        """The shard to which the next documents are appended."""
        if self.writer and self.writer.bytes > SHARD_BYTES:
            self._close_shard()
        if not self.writer:
            name = f"shard-{self.part:06d}-{len(self.shards):03d}"
            self.writer = ShardWriter(self.folder, name, self.vocabulary)
        return self.writer

    @torch.no_grad()
    def _encode_images(self, pixels: list[torch.Tensor]) -> Iterator[bytes]:
        """Ids of each image as bytes, encoded in batches; `pixels`: float32 [3, H, W] each."""
        for start in range(0, len(pixels), self.settings.batch_size):
            chosen = pixels[start : start + self.settings.batch_size]
            codes = self.tokenizers.image.encode(torch.stack(chosen))
            assert codes.shape == (len(chosen), self.vocabulary.image_tokens), f"the image tokenizer gave {codes.shape}"
            ids = (codes.cpu().numpy() + self.vocabulary.image_start).astype(self.reader.text.dtype)
            yield from (row.tobytes() for row in ids)

    def _close_shard(self) -> None:
        if self.writer:
            self.shards.append(self.writer.close())
            self.writer = None
