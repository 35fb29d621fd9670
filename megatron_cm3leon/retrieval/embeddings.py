"""Embeddings of a corpus on disk: encoded in parts, and continued where an interrupted run stopped.

embeddings/bank.npy              float16 [documents of the bank, width], unit vectors of whole pairs
embeddings/bank_identities.npy   uint64 [documents, 2], what makes two pictures the same
embeddings/bank.json             settings, and how many documents are done
embeddings/queries.npy ...       the same of the query documents, part of whose text tokens is dropped
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.data.shards import Corpus, write_json
from megatron_cm3leon.retrieval.encoder import Encoder, combine
from megatron_cm3leon.tokenizers.pixels import load_picture

PART_DOCUMENTS = 4096
"""Documents between two notes of progress."""
BATCH_DOCUMENTS = 64
DTYPE = np.float16

ReadPictures = Callable[[Sequence[int]], list[Image.Image]]


def read_source_pictures(corpus: Corpus) -> ReadPictures:
    """Reader of the raw pictures, from the folder that the shards were made from."""
    folder = Path(corpus.manifest["input"])
    table = corpus.metadata(["image", "picture_sha256"])
    names, checksums = table.column("image"), table.column("picture_sha256")

    def read(numbers: Sequence[int]) -> list[Image.Image]:
        return [_read_source(folder / names[n].as_py(), checksums[n].as_py(), corpus) for n in numbers]

    return read


def _read_source(path: Path, checksum: str, corpus: Corpus) -> Image.Image:
    """Read one raw picture; ValueError when it is gone or no longer the one that was tokenised."""
    remedy = "put it back, or decode pictures from the image tokens: --pictures tokens --tokenizer FOLDER."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}, a picture of {corpus.folder}, cannot be read ({error.strerror}); {remedy}"
        ) from error
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"{path} is not the picture that {corpus.folder} was made from (its sha256 differs); {remedy}")
    return load_picture(content)


def read_token_pictures(corpus: Corpus, image_tokenizer) -> ReadPictures:
    """Reader that decodes pictures from the image tokens of the shards."""
    import torch

    from megatron_cm3leon.tokenizers.pixels import from_pixels

    vocabulary = corpus.vocabulary

    def read(numbers: Sequence[int]) -> list[Image.Image]:
        codes = []
        for number in numbers:
            ids = corpus.read(number).astype(np.int64)
            codes.append(ids[vocabulary.is_image(ids)][: vocabulary.image_tokens] - vocabulary.image_start)
            if len(codes[-1]) != vocabulary.image_tokens:
                raise ValueError(f"document {number} of {corpus.folder} has no whole picture to encode.")
        pixels = image_tokenizer.decode(torch.from_numpy(np.stack(codes)))
        return [from_pixels(picture) for picture in pixels]

    return read


def encode_corpus(
    folder: Path,
    encoder: Encoder,
    corpus: Corpus,
    read_pictures: ReadPictures,
    outputs: dict[str, dict],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write or finish embeddings of all documents in `folder`.

    `outputs` maps a name (bank, queries) to its settings, which hold at least query_dropout and seed; two of
    them share the work on pictures. Settings are compared with what is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = min(_open_output(folder, name, settings, corpus, encoder.width) for name, settings in outputs.items())
    advance(done)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in outputs}
    captions = corpus.metadata(["caption"]).column("caption")
    for part in range(done, corpus.documents, PART_DOCUMENTS):
        end = min(part + PART_DOCUMENTS, corpus.documents)
        for start in range(part, end, BATCH_DOCUMENTS):
            numbers = range(start, min(start + BATCH_DOCUMENTS, end))
            texts = [captions[number].as_py() or "" for number in numbers]
            pictures = encoder.encode_pictures(read_pictures(numbers))
            for name, settings in outputs.items():
                keys = [(settings["seed"], number) for number in numbers]
                vectors = encoder.encode_texts(texts, settings["query_dropout"], keys)
                arrays[name][start : numbers.stop] = combine(vectors, pictures)
            advance(len(numbers))
        for name, settings in outputs.items():
            arrays[name].flush()
            write_json(folder / f"{name}.json", {"settings": settings, "done": end})


def _open_output(folder: Path, name: str, settings: dict, corpus: Corpus, width: int) -> int:
    """Documents that an earlier run finished with the same settings; starts the files where there are none."""
    note = folder / f"{name}.json"
    if note.is_file():
        written = json.loads(note.read_text())
        differing = [
            f"{key}: {written['settings'].get(key)} instead of {settings[key]}"
            for key in settings
            if written["settings"].get(key) != settings[key]
        ]
        if differing:
            raise ValueError(
                f"{folder / name}.npy was begun with other settings ({'; '.join(differing)}); give another --output, "
                f"or --overwrite to encode again."
            )
        return written["done"]
    np.lib.format.open_memmap(folder / f"{name}.npy", "w+", DTYPE, (corpus.documents, width)).flush()
    np.save(folder / f"{name}_identities.npy", compute_identities(corpus))
    write_json(note, {"settings": settings, "done": 0})
    return 0


def compute_identities(corpus: Corpus) -> np.ndarray:
    """uint64 [documents, 2]: the first 64 bits of the picture file's sha256, and a hash of the image tokens.

    Pictures that the image tokenizer cannot tell apart are the same picture to the model.
    """
    identities = np.zeros((corpus.documents, 2), np.uint64)
    checksums = corpus.metadata(["picture_sha256"]).column("picture_sha256")
    for number in range(corpus.documents):
        identities[number, 0] = int((checksums[number].as_py() or "0")[:16], 16)
        ids = corpus.read(number)
        codes = ids[corpus.vocabulary.is_image(ids)]
        if len(codes):
            identities[number, 1] = int.from_bytes(hashlib.blake2b(codes.tobytes(), digest_size=8).digest(), "big")
    return identities
