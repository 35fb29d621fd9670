"""LoRA (arXiv 2106.09685): adapters of linear layers.

y = W x + alpha / rank x B A dropout(x); A [rank, inputs] is drawn as all initial weights are, B [outputs, rank] is 0.
A fused layer (queries, keys and values; gate and up) has one adapter: its parts share A.

Layout legend: S sequence (of this rank under sequence parallelism), B batch, I features in.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.config.patterns import LINEAR_LAYERS
from megatron_cm3leon.model.linear import (
    ALONE,
    COLUMN,
    COLUMN_SEQUENCE,
    ROW,
    ROW_SEQUENCE,
    ColumnLinear,
    OwnForward,
    RowLinear,
)
from megatron_cm3leon.model.weights import list_adapted


class AdapterMatrix(OwnForward, torch.nn.Module):
    """A or B of an adapter."""

    def __init__(self, rows: int, columns: int, kind: str, dtype: torch.dtype, tp_group: dist.ProcessGroup) -> None:
        """`rows` and `columns`: of this tensor-parallel rank; `kind` as above."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype))
        self.kind, self.tp_group = kind, tp_group

    def forward(self, input_SBI: torch.Tensor) -> torch.Tensor:
        return self.multiply(input_SBI, self.weight, self.kind)


class Adapter(torch.nn.Module):
    """scale x B A of a dropped-out input (LoRA, arXiv 2106.09685), under tensor and sequence parallelism.

    Only states of width `rank` are communicated. Beside a column-parallel layer A is whole on every rank and B is
    partitioned: B's product sums, or scatters, the gradients of A's output. Beside a row-parallel layer A is
    partitioned, its outputs are summed, or scattered, and B is whole. With sequence parallelism a whole matrix
    multiplies this rank's part of the sequence: its gradients are summed over the tensor-parallel ranks, as those of
    norms are.
    """

    def __init__(self, layer: ColumnLinear | RowLinear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        column, sequence = isinstance(layer, ColumnLinear), layer.sequence_parallel
        rows, columns = layer.weight.shape
        kinds = [ALONE, ALONE]
        if layer.tp_group.size() > 1 and column:
            kinds = [ALONE, COLUMN_SEQUENCE if sequence else COLUMN]
        elif layer.tp_group.size() > 1:
            kinds = [ROW_SEQUENCE if sequence else ROW, ALONE]
        options = layer.weight.dtype, layer.tp_group
        self.lora_A = AdapterMatrix(rank, columns, kinds[0], *options)
        self.lora_B = AdapterMatrix(rows, rank, kinds[1], *options)
        whole, partitioned = (self.lora_A, self.lora_B) if column else (self.lora_B, self.lora_A)
        whole.weight.sequence_parallel = sequence  # type: ignore[attr-defined]  # megatron-core sums these gradients
        set_tensor_model_parallel_attributes(partitioned.weight, True, 0 if column else 1, 1)
        self.scale, self.dropout = scale, dropout
        # Masks are equal on ranks with equal inputs, and independent elsewhere, as those of the model's own dropout.
        self.has_equal_inputs = column and not sequence

    def forward(self, input_SBI: torch.Tensor) -> torch.Tensor:
        if self.dropout and self.training:
            with nullcontext() if self.has_equal_inputs else get_cuda_rng_tracker().fork():
                input_SBI = torch.nn.functional.dropout(input_SBI, self.dropout)
        return self.lora_B(self.lora_A(input_SBI) * self.scale)


def add_adapters(model: GPTModel, config: Config, first_layer: int) -> None:
    """Add the adapters of `config.lora` to the layers of a stage that begins with layer `first_layer`."""
    adapted = list_adapted(config)
    for number, layer in enumerate(model.decoder.layers, first_layer):
        for word, path in LINEAR_LAYERS.items():
            if (number, word) in adapted:
                linear = layer.get_submodule(path)
                linear.lora = Adapter(linear, config.lora.rank, config.lora.scale, config.lora.dropout)
                linear.has_adapter = True
