"""AdamW, the gradient norm and clipping, the same on a CPU and a GPU.

With train.kernels=auto megatron-core uses AdamW of TransformerEngine or apex where one is installed; without them, and
with train.kernels=torch, this module gives it torch's fused kernel: one pass over weights, gradients and moments.
"""

import torch
from megatron.core import optimizer as core
from megatron.core.optimizer import MegatronOptimizer

_INSTALLED = None if core.USING_PYTORCH_OPTIMIZER else core.Adam
"""TransformerEngine's or apex's class, as megatron-core found it."""


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, with the options that megatron-core passes."""

    def __init__(self, params, adam_w_mode: bool = True, **options) -> None:
        assert adam_w_mode, "the decay is decoupled"
        super().__init__(params, fused=True, **options)


def choose_adamw(kernels: str) -> type[torch.optim.Optimizer]:
    """The AdamW class of train.kernels; megatron-core builds it from now on."""
    chosen = FusedAdamW if _INSTALLED is None or kernels == "torch" else _INSTALLED
    core.Adam, core.USING_PYTORCH_OPTIMIZER = chosen, False  # True would mean torch's AdamW with its defaults
    return chosen


def load_moments(adam: torch.optim.Optimizer, main: torch.Tensor, moments: dict[str, torch.Tensor], updates: int):
    """Give AdamW the moments of one parameter after `updates` steps, in the form of its class."""
    adam.state[main] = moments
    if isinstance(adam, torch.optim.AdamW):  # counts per parameter, where the fused kernel reads it
        moments["step"] = torch.tensor(float(updates), dtype=torch.float32, device=main.device)
    else:  # FusedAdam of TransformerEngine and apex counts per group
        for group in adam.param_groups:
            group["step"] = updates


def squared_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of the squares of all gradients, fp64 on `device`; does not synchronize with it."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def clip_gradients(gradients: list[torch.Tensor], norm: float, largest: float) -> None:
    """Scale gradients with the global norm `norm` down to the norm `largest`; 0: no clipping."""
    factor = largest / (norm + 1e-6)
    if largest and factor < 1:
        torch._foreach_mul_(gradients, factor)


def global_squared_norm(optimizer: MegatronOptimizer, device: torch.device) -> torch.Tensor:
    """squared_norm() over all ranks; copies on tensor-parallel ranks and of tied embeddings count once. Collective."""
    square = squared_norm(optimizer.get_main_grads_for_grad_norm(), device)
    torch.distributed.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square
