"""FlexAttention with gradients on a CPU. torch implements the backward pass there with plain matrix products, but
rejects it because inductor has no code for it. Tests use it as the reference for the kernel of a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch.nn.attention import flex_attention

from megatron_cm3leon.engine import cpu_backend
from megatron_cm3leon.model import sample_attention

BACKEND = "aot_eager"
"""torch.compile's back end that traces and differentiates as for a GPU, and executes torch's operators."""


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """A context in which FlexAttention works on a CPU, also in layers that train.compile compiles."""
    cpu_backend.install()  # before megatron-core, which the next line imports
    from megatron_cm3leon.engine import compile

    with (
        patch.object(sample_attention, "require_backward_pass", lambda device: None),
        patch.object(flex_attention, "_validate_device", lambda query, key, value: None),
        patch.object(sample_attention, "BACKEND", BACKEND),
        patch.object(compile, "BACKEND", BACKEND),
    ):
        yield
