"""FlexAttention with gradients on a CPU: torch has the operator's backward pass there, as plain matrix products, and
refuses it because inductor has no code for it. Tests take it as the oracle of the GPU's kernel.
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
    """In here it works, in layers that train.compile compiles too."""
    cpu_backend.install()  # before megatron-core is imported, which the next line does
    from megatron_cm3leon.engine import compile

    with (
        patch.object(sample_attention, "require_backward_pass", lambda device: None),
        patch.object(flex_attention, "_validate_device", lambda query, key, value: None),
        patch.object(sample_attention, "BACKEND", BACKEND),
        patch.object(compile, "BACKEND", BACKEND),
    ):
        yield
