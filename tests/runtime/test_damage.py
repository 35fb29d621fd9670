"""One bit is flipped in each kind of file that a run reads: an error names the file, or the used content is unchanged.

`python -m tests.runtime.test_damage 5000` prints a table of outcomes per kind of file for that many seeds.
"""

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_cm3leon.checkpoint.format import KINDS
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.verify import verify_while_reading
from megatron_cm3leon.common.atomic_io import add_checksum, write_json
from megatron_cm3leon.config.loading import Config, changed_fields, load_config, save_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.neighbors import (
    CHECKED_ROWS,
    CHECKSUMS,
    FORMAT,
    INDEX_FILE,
    checksum_rows,
    load_neighbors,
    manifest_sha256,
)
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.tokenizers.folder import Tokenizers, write_vocabulary
from tests.checkpoint.builders import write_checkpoint
from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.tokenizers.test_folder import write_image, write_text

DOCUMENTS = 2 * CHECKED_ROWS + 7


def write_run_inputs(folder: Path) -> None:
    """Write everything a run reads: shards/, index/, tokenizer/ and run/ with a checkpoint."""
    corpus = write_shards(folder / "shards", make_pairs(DOCUMENTS, make_vocabulary()), make_vocabulary(), 300)
    table = np.random.default_rng(0).integers(-1, DOCUMENTS, (DOCUMENTS, 4))
    (folder / "index").mkdir()
    np.save(folder / "index" / "neighbors.npy", table)
    np.save(folder / "index" / CHECKSUMS, checksum_rows(table))
    entries = {"shards": str(corpus.folder), "shards_relative": "../shards"}
    entries |= {"bank": entries["shards"], "bank_relative": "../shards", "neighbors": 4, "format": FORMAT}
    hashes = dict.fromkeys(("shards_manifest_sha256", "bank_manifest_sha256"), manifest_sha256(corpus))
    description = entries | hashes | {"vocabulary_hash": corpus.vocabulary.hash, "command": "build_index.py"}
    write_json(folder / "index" / INDEX_FILE, add_checksum(description))
    (folder / "tokenizer").mkdir()
    write_text(folder / "tokenizer")
    write_image(folder / "tokenizer")
    write_vocabulary(folder / "tokenizer", specials=20, sentinels=8)
    config = Config()
    validate_config(config)
    write_checkpoint(folder / "run", kinds=KINDS, config=config)
    save_config(config, folder / "run" / "config.yaml")


def read_shards(folder: Path) -> object:
    corpus = open_shards(folder / "shards")
    numbers = np.arange(corpus.documents)
    out = np.empty(corpus.lengths.sum(), corpus.dtype)
    corpus.read_into(numbers, out, np.cumsum(np.r_[0, corpus.lengths[:-1]]))
    return out.tobytes(), corpus.lengths.tolist(), corpus.identity, corpus.vocabulary, corpus.metadata().to_pylist()


def read_index(folder: Path) -> object:
    neighbors = load_neighbors(folder / "index", open_shards(folder / "shards"))
    neighbors.check(np.arange(DOCUMENTS))
    return neighbors.table.tobytes(), str(neighbors.bank.folder)


def read_tokenizers(folder: Path) -> object:
    tokenizers = Tokenizers.load(folder / "tokenizer")
    weights = {name: tensor.numpy().tobytes() for name, tensor in tokenizers.image.model.state_dict().items()}
    return tokenizers.text.encode("a red square"), weights, tokenizers.vocabulary, tokenizers.image.grid


def read_checkpoint(folder: Path) -> object:
    reader = CheckpointReader(folder / "run" / "checkpoints" / "step-00000003")
    with verify_while_reading(reader, reader.rank_files):
        tensors = {kind: reader.read("w", kind).numpy().tobytes() for kind in KINDS}
    return tensors, reader.config, reader.vocabulary, reader.state


def read_config(folder: Path) -> object:
    """A changed configuration is an error here, since train.py reports the difference to the checkpoint's."""
    config = load_config(folder / "run" / "config.yaml")
    validate_config(config)
    changes = changed_fields(CheckpointReader(folder / "run" / "checkpoints" / "step-00000003").config, config)
    if changes:
        raise ValueError(f"config.yaml: {', '.join(changes)} changed since the checkpoint")
    return config


CHECKPOINT = "run/checkpoints/step-00000003/"
READERS = {
    **{f"shards/shard-000000-000{ending}": read_shards for ending in (".tar", ".idx.npy", ".parquet")},
    "shards/manifest.json": read_shards,
    **{f"index/{name}": read_index for name in ("neighbors.npy", CHECKSUMS, INDEX_FILE)},
    **{f"tokenizer/{name}": read_tokenizers for name in ("text.model", "vocab.json", "image/config.json")},
    "tokenizer/image/model.safetensors": read_tokenizers,
    **{CHECKPOINT + name: read_checkpoint for name in ("rank-00000.safetensors", "manifest.json", "state.json")},
    **{CHECKPOINT + name: read_checkpoint for name in ("config.yaml", "vocab.json")},
    "run/config.yaml": read_config,
}


def names_file(path: Path, error: Exception) -> bool:
    """Whether the error is one for users that names the file, or the field of the configuration."""
    return type(error) is ValueError and (path.name in str(error) or path.parent.name == "run")


def flip_bit(folder: Path, name: str, seed: int, expected: object) -> str:
    """The outcome for one bit of a file, drawn by `seed`; the file is restored."""
    path, generator = folder / name, random.Random(seed)
    content = path.read_bytes()
    changed = bytearray(content)
    changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    path.write_bytes(changed)
    try:
        return "unchanged" if READERS[name](folder) == expected else "NOT DETECTED"
    except Exception as error:
        return "reported" if names_file(path, error) else f"MISLEADING {type(error).__name__}: {str(error)[:90]}"
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    write_run_inputs(folder)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_reported_or_changes_nothing(folder, name):
    expected = READERS[name](folder)
    outcomes = Counter(flip_bit(folder, name, seed, expected) for seed in range(12))
    assert set(outcomes) <= {"reported", "unchanged"}, outcomes
    if name.endswith((".parquet", "crc32.npy", "text.model", ".safetensors")):
        assert outcomes["reported"] > 0


def main(seeds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_run_inputs(folder)
        expected = {name: read(folder) for name, read in READERS.items()}
        outcomes = {name: Counter() for name in READERS}
        for seed in range(seeds):
            name = list(READERS)[seed % len(READERS)]
            outcomes[name][flip_bit(folder, name, seed, expected[name])] += 1
        for name, found in outcomes.items():
            reported, unchanged = found.pop("reported", 0), found.pop("unchanged", 0)
            print(f"{name:<48} {reported:>5} reported {unchanged:>5} unchanged", dict(found) or "")


if __name__ == "__main__":
    main(int(sys.argv[1]))
