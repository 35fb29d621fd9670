"""Which kernels a run uses, for its log: libraries and devices choose many of them by themselves."""

import torch
from torch.nn.attention import SDPBackend

from megatron_cm3leon.config import Config


def describe_kernels(
    config: Config, device: torch.device, adam: type[torch.optim.Optimizer], compiled: bool, accumulates: bool
) -> dict[str, str]:
    """Kind of work -> who does it. `accumulates`: weight gradients are added to fp32 inside their product."""
    in_fp32 = device.type == "cuda" or config.train.precision == "fp32"
    gradients = "product, then addition"
    if accumulates:
        gradients = "accumulated in the product" if in_fp32 else "product in bf16, then added in fp32"
    return {
        "attention": choose_attention(config, device),
        "AdamW": "torch, fused" if issubclass(adam, torch.optim.AdamW) else f"{adam.__module__}.{adam.__name__}",
        "norms": "torch",
        "layers": "compiled, one graph" if compiled else "not compiled",
        "weight gradients": gradients,
    }


def choose_attention(config: Config, device: torch.device) -> str:
    """The kernel that torch takes for causal attention at the run's shape, or that it is given a mask."""
    model = config.model
    if config.data.attention == "sample":
        return "within samples"
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    heads = model.heads // config.parallel.tensor, model.kv_heads // config.parallel.tensor
    query, keys = (
        torch.empty(1, count, config.data.seq_length, model.hidden_size // model.heads, dtype=dtype, device=device)
        for count in heads
    )
    query.requires_grad_()
    choice = torch._fused_sdp_choice(query, keys, keys, None, 0.0, True, enable_gqa=heads[0] != heads[1])
    return f"torch, {SDPBackend(choice).name.lower()}"
