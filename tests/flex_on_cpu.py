"""FlexAttention with gradients on a CPU: torch has the operator's backward pass there, as plain matrix products, and
refuses it because inductor has no code for it. Tests take it as the oracle of the GPU's kernel.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch.nn.attention import flex_attention

from megatron_cm3leon.model import sample_attention


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """In here it works; torch.compile traces and differentiates as for a GPU, and executes torch's operators."""
    with (
        patch.object(sample_attention, "require_backward_pass", lambda device: None),
        patch.object(flex_attention, "_validate_device", lambda query, key, value: None),
        patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield
