"""Runs of preprocessing with a stand-in for the tokenizers, and what they leave on the disk."""

import json

from megatron_cm3leon.data.preprocess.run import PreprocessOptions, preprocess
from megatron_cm3leon.data.sources import open_source
from tests.data.corpora import ByteTokenizers


def run(inputs, output, part_size=4, form="auto", **options):
    """Preprocess `inputs` into `output`; returns the manifest."""
    options = {"load_tokenizers": ByteTokenizers.load, "max_bad_fraction": 0.0, "batch_size": 3, **options}
    source = open_source(inputs, part_size, form)
    return preprocess(source, PreprocessOptions(tokenizer=output, output=output, **options))


def read_all(source):
    """Every input of a source, in order."""
    return [entry for part in range(source.parts) for entry in source.read_part(part)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def quarantine_of(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def counts_of(manifest):
    """The account without its reasons, as (read, written, duplicates, filtered, quarantined)."""
    accounts = manifest["accounts"]
    assert accounts["read"] == sum(accounts[name] for name in ("written", "duplicates", "filtered", "quarantined"))
    assert sum(accounts["reasons"].values()) == accounts["read"] - accounts["written"]
    return tuple(accounts[name] for name in ("read", "written", "duplicates", "filtered", "quarantined"))
