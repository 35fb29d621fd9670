"""Small decoders with random weights, in the form used on a GPU."""

import os

import torch

from megatron_cm3leon.export.layouts import Shape, stock_weights
from megatron_cm3leon.generation.decoder import Decoder

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def build_decoder(
    family, *, hidden=64, heads=4, kv_heads=None, width=None, inner=None, layers=1, vocabulary=40, context=160,
    activation="gelu", dtype=torch.float32, quantized=None, deviation=0.1,
):  # fmt: skip
    opt = family == "opt"
    shape = Shape(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads or (heads if opt else heads // 2),
        width=width or hidden // heads,
        inner=inner or 4 * hidden,
        context=context,
        vocabulary=vocabulary,
        tied=opt,
        activation=activation if opt else "silu",
        rope_base=0.0 if opt else 10_000.0,
    )
    weights = {}
    for name, size in stock_weights(shape).items():
        weight = torch.randn(size) * deviation
        weights[name] = (1 + weight if len(size) == 1 else weight).to(DEVICE, dtype)
    return Decoder(weights, shape, quantized)
