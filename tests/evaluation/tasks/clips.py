"""Small CLIP folders with random weights for the tests of tasks."""

import torch

from megatron_cm3leon.retrieval.encoder import TEXT_MODEL, build_tiny_clip, save_clip
from megatron_cm3leon.tokenizers.text import train_text

CAPTIONS = [f"a {color} {shape} on {ground}" for color in ("red", "blue", "green") for shape in ("circle", "square")
            for ground in ("white", "black")]  # fmt: skip


def write_clip(folder, seed=0):
    """A CLIP of 16 x 16 pixels and width 32; returns the folder."""
    folder.mkdir(parents=True)
    tokenizer = train_text(CAPTIONS, 280)
    tokenizer.save(folder / TEXT_MODEL)
    torch.manual_seed(seed)
    save_clip(build_tiny_clip(tokenizer.size, 16, 8, 32, 1), folder)
    return folder
