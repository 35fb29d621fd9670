"""Instruction documents as text, and runs of preprocessing that write them."""

import json

import numpy as np
from PIL import Image

from megatron_cm3leon.data.preprocess.run import PreprocessOptions, preprocess
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.data.sources import BadInput
from megatron_cm3leon.data.tasks.options import TaskOptions, open_instructions
from tests.data.corpora import ByteTokenizers
from tests.data.runs import read_all

BRIGHTNESS = {"white.png": 255, "gray.png": 136, "black.png": 0}
"""Images of 8 x 8 pixels, whose four codes are 15, 8 and 0."""


def write_gray_images(folder):
    """Write the images of BRIGHTNESS."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, level in BRIGHTNESS.items():
        Image.new("RGB", (8, 8), (level,) * 3).save(folder / name)


def write_rows(path, rows):
    """Write rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_rows(inputs, form="auto", part_size=10, **options):
    """The source of instruction documents."""
    return open_instructions(inputs, part_size, form, TaskOptions(**options))


def read_one(inputs, form="auto", **options):
    """The only input, as text: pieces with | between segments, targets in [], images by name; or its reason."""
    (entry,) = read_all(open_rows(inputs, form, **options))
    return show_entry(entry)


def show_entry(entry):
    """An input as text, see `read_one`."""
    if isinstance(entry, BadInput):
        return entry.reason
    text = ""
    for piece, role, joined in zip(entry.segments, entry.roles, entry.joined, strict=True):
        shown = piece if isinstance(piece, str) else f"<{piece.name}>"
        text += ("" if joined or not text else "|") + (f"[{shown}]" if role == "target" else shown)
    return text


def run_rows(inputs, output, form="auto", part_size=4, task_options=None, **options):
    """Preprocess rows with ByteTokenizers; returns the opened shards."""
    source = open_rows(inputs, form, part_size, **(task_options or {}))
    options = {"load_tokenizers": ByteTokenizers.load, "max_bad_fraction": 0.0, "batch_size": 3, **options}
    preprocess(source, PreprocessOptions(tokenizer=output, output=output, **options))
    return open_shards(output)


def show_document(corpus, number):
    """Tokens of a document as text: | for <break>, [ and ] around targets, the codes of an image as <15>."""
    vocabulary, ids = corpus.vocabulary, corpus.read(number).tolist()
    starts, ends = (corpus.targets(np.array([number]))[0][:, column].tolist() for column in (0, 1))
    text, position = b"", 0
    while position <= len(ids):
        text += b"]" * (position in ends) + b"[" * (position in starts)
        if position == len(ids):
            break
        token = ids[position]
        if token == vocabulary.break_id:
            text += b"|"
        elif vocabulary.image_start <= token < vocabulary.image_end:
            assert ids[position : position + 4] == [token] * 4
            text += f"<{token - vocabulary.image_start}>".encode()
            position += 3
        else:
            text += bytes([token])
        position += 1
    return text.decode()
