"""Compile the kernels of decoding steps while the weights are still being read.

Triton compiles a kernel when it is first launched with its constants: about eight kernels, 0.5 to 3 seconds each in
the first process on a machine (later ones load them from disk). One step of a decoder with a single layer of zeros
launches every kernel of a step.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import torch

from megatron_cm3leon.export.layouts import DTYPES, Shape, stock_weights
from megatron_cm3leon.generation.decoder import Decoder, plain_dtype


@torch.inference_mode()
def compile_steps(
    shape: Shape, dtype: str, device: torch.device, head_rows: int, positions: int, streams: tuple[int, ...]
) -> None:
    """Launch each kernel of a step once, for each number of `streams`, over a cache of `positions`.

    `dtype` is one of decoder.KINDS; `head_rows`, the number of ids that may be drawn, decides the tile of the head.
    Allocates the memory of one layer and this head, and frees it.
    """
    from megatron_cm3leon.generation.fused_step import FusedStep
    from megatron_cm3leon.generation.noise_kernel import write_noise

    small = replace(shape, layers=1, vocabulary=head_rows)
    plain = plain_dtype(dtype, device)
    weights = {name: torch.zeros(size, dtype=plain, device=device) for name, size in stock_weights(small).items()}
    decoder = Decoder(weights, small, None if dtype in DTYPES else dtype)
    fused, zero = FusedStep(decoder), torch.zeros(1, dtype=torch.long, device=device)
    for count in streams:
        cache = decoder.build_cache(count, positions, flat=False)
        fused.logits(fused.advance(zero.expand(count).contiguous(), cache), decoder.head())
    write_noise(zero.expand(1, 2).contiguous(), zero, zero.expand(16).contiguous(), torch.zeros(1, 64, device=device))


@contextmanager
def compile_in_background(compile_all: Callable[[], None], device: torch.device) -> Iterator[None]:
    """Run `compile_all` in a thread during the `with` block, if `device` is a GPU and Triton is installed.

    Leaving the block waits for the thread and raises its exception, if any.
    """
    if device.type != "cuda" or not find_spec("triton"):
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(compile_all)
        yield
        compiled.result()
