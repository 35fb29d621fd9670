"""Description of the kernels of a run, for its log: libraries and devices select many of them automatically."""

import torch
from torch.nn.attention import SDPBackend

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.model.sample_attention import uses_flex


def describe_kernels(
    config: Config, device: torch.device, adam: type[torch.optim.Optimizer], compiled: bool, accumulates: bool
) -> dict[str, str]:
    """Kind of work -> kernel. `accumulates`: the matrix products add weight gradients to fp32 buffers."""
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
        "cross-entropy": choose_cross_entropy(config, device),
    }


def choose_attention(config: Config, device: torch.device) -> str:
    """Kernel that torch selects for causal attention with the run's shape, or the form of attention per sample."""
    model = config.model
    if config.data.attention == "sample":
        flex = uses_flex(config.train.sample_attention, device, model.dropout)
        return "per sample, FlexAttention" if flex else "per sample, masked"
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    heads = model.heads // config.parallel.tensor, model.kv_heads // config.parallel.tensor
    query, keys = (
        torch.empty(1, count, config.data.seq_length, model.hidden_size // model.heads, dtype=dtype, device=device)
        for count in heads
    )
    query.requires_grad_()
    choice = torch._fused_sdp_choice(query, keys, keys, None, 0.0, True, enable_gqa=heads[0] != heads[1])
    return f"torch, {SDPBackend(choice).name.lower()}"


def choose_cross_entropy(config: Config, device: torch.device) -> str:
    """Kernel of the loss, and the number of tokens whose logits exist at once."""
    kernel = "one kernel per pass" if device.type == "cuda" else "torch"
    return f"{kernel}, {config.train.head_chunk} tokens at a time" if config.train.head_chunk else kernel
