"""Runs of preprocessing with ByteTokenizers, and readers of the files that they write."""

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


def read_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_quarantine(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def check_counts(manifest):
    """Check the sums of the counts; returns (read, written, duplicates, filtered, quarantined)."""
    counts = manifest["accounts"]
    assert counts["read"] == sum(counts[name] for name in ("written", "duplicates", "filtered", "quarantined"))
    assert sum(counts["reasons"].values()) == counts["read"] - counts["written"]
    return tuple(counts[name] for name in ("read", "written", "duplicates", "filtered", "quarantined"))
