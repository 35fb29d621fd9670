"""Floating-point operations of training."""

import math

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.model.weights import POSITION_EMBEDDINGS, WORD_EMBEDDINGS, canonical_shapes


def flops_per_token(config: Config, vocabulary_size: int) -> int:
    """Floating-point operations of the forward and backward pass per token, without recomputation.

    6 per weight of each matrix (with the output head, tied or not; without embedding look-ups), plus 6 x layers x
    seq_length x hidden_size for causal attention, which is half of the full attention matrix.
    """
    model = config.model
    shapes = canonical_shapes(config, vocabulary_size)
    looked_up = {WORD_EMBEDDINGS, POSITION_EMBEDDINGS}
    weights = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) > 1 and name not in looked_up)
    if model.tied_embeddings:
        weights += vocabulary_size * model.hidden_size
    return 6 * weights + 6 * model.layers * config.data.seq_length * model.hidden_size
