"""Patterns that name layers, in lora.layers and train.only.

    *                        every linear layer of the transformer layers
    attention                linear_qkv and linear_proj
    mlp                      linear_fc1 and linear_fc2
    linear_qkv, linear_proj, linear_fc1, linear_fc2
    norms                    the norms (train.only; family llama)
    layers.3, layers.0-11    all of these in layer 3, or in layers 0 to 11
    layers.0-11.mlp          one of them in these layers

A list selects what any of its patterns selects. train.only has further words: embeddings (of words and positions),
image_rows (the rows of the image codes in the word embedding and the output layer) and output (the output layer).
"""

import re

LINEAR_LAYERS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
"""Word of a pattern -> the linear layer in a canonical name (model/weights.py)."""
_GROUPS = {
    "*": tuple(LINEAR_LAYERS),
    "attention": ("linear_qkv", "linear_proj"),
    "mlp": ("linear_fc1", "linear_fc2"),
    **{name: (name,) for name in LINEAR_LAYERS},
}
NORMS = "norms"
OUTER_WORDS = ("embeddings", "image_rows", "output")
"""Words of train.only for parameters outside of the transformer layers."""
_PATTERN = re.compile(r"(?:layers\.(\d+)(?:-(\d+))?(?:\.|$))?(.*)")


def list_selected(field: str, patterns: list[str], layers: int) -> set[tuple[int, str]]:
    """(layer, word) of everything that patterns select in a model of `layers` layers; word: a key of LINEAR_LAYERS, or
    NORMS in train.only. OUTER_WORDS select nothing here.

    Raises ValueError, with the possible patterns, for an unknown one, and for a layer that the model does not have.
    """
    selected: set[tuple[int, str]] = set()
    for pattern in patterns:
        if field == "train.only" and pattern in OUTER_WORDS:
            continue
        found = _PATTERN.fullmatch(pattern)
        first, last, word = found.groups() if found else (None, None, pattern)
        groups = _GROUPS if field != "train.only" else _GROUPS | {NORMS: (NORMS,)}
        if word not in groups and not (first is not None and not word):
            words = [*groups, *(OUTER_WORDS if field == "train.only" else ())]
            raise ValueError(
                f"{field} ({pattern}) must be one of {', '.join(words)}, or such a layer of some layers only: "
                f"layers.3, layers.0-11, layers.0-11.mlp."
            )
        low = int(first) if first is not None else 0
        high = int(last or first) if first is not None else layers - 1
        if not low <= high < layers:
            raise ValueError(
                f"{field} ({pattern}) must name layers of the model in ascending order, which are "
                f"layers.0-{layers - 1} (model.layers); correct the numbers."
            )
        everything = tuple(groups["*"]) + ((NORMS,) if field == "train.only" and first is not None else ())
        for part in groups[word] if word else everything:
            selected |= {(layer, part) for layer in range(low, high + 1)}
    return selected
