"""Matrix products in Triton equal those of torch and do not copy an 8-bit matrix to 16 or 32 bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cm3leon.generation import kernels, matrices
from megatron_cm3leon.generation.fused_step import sum_rows
from megatron_cm3leon.generation.matrices import ScaledMatrix
from megatron_cm3leon.generation.matrix_kinds import build_matrix
from megatron_cm3leon.generation.products import multiply_rows
from tests.interpreted.models import DEVICE, build_decoder


class LargestResult(TorchDispatchMode):
    """Records the elements of the largest floating-point tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.itemsize > 1:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(("rows", "quantized"), [(1, "int8"), (4, "fp8"), (5, "fp8"), (40, "int8"), (70, "int8")])
def test_an_8_bit_matrix_is_not_copied(rows, quantized):
    weight, x = torch.randn(200, 100, device=DEVICE), torch.randn(rows, 100, device=DEVICE)
    matrix = build_matrix(weight, quantized)
    assert type(matrix) is ScaledMatrix and matrix.weight.itemsize == 1
    with LargestResult() as record:
        result = matrix(x)
    assert record.largest == result.numel() < weight.numel()
    expected = x @ (matrix.weight.float() * matrix.scale[:, None]).T
    assert (result - expected).norm() < 1e-6 * expected.norm()
    assert (result - x @ weight.T).norm() < 0.04 * expected.norm()


def test_products_of_bf16_rows_and_8_bit_matrices():
    matrix = build_matrix(torch.randn(40, 64, device=DEVICE), "int8")
    x = torch.randn(2, 3, 64, device=DEVICE).bfloat16()
    expected = x.float() @ (matrix.weight.float() * matrix.scale[:, None]).T
    result = matrix(x)
    assert result.shape == (2, 3, 40) and result.dtype == torch.bfloat16
    assert (result - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("width", [33, 96, 512, 1536])
def test_norms_and_epilogues_equal_those_of_torch(width):
    x, gain = 3 + torch.randn(2, width, device=DEVICE), torch.rand(width, device=DEVICE)
    weight = torch.randn(24, width, device=DEVICE) / width**0.5
    layer = torch.nn.functional.layer_norm(x, (width,)) @ weight.T
    rms = torch.nn.functional.rms_norm(x, (width,), gain, 1e-5) @ weight.T
    sums = {"norm": kernels.LAYER_NORM, "weight_sums": sum_rows(build_matrix(weight)), "epsilon": 1e-5}

    def multiply(units=24, out=None, **options):
        out = torch.empty(2, units, device=DEVICE) if out is None else out
        return multiply_rows(x, weight, None, out, **options)

    close = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(multiply(), x @ weight.T, **close)
    assert torch.allclose(multiply(epilogue=kernels.RELU, **sums), layer.relu(), **close)
    assert torch.allclose(multiply(epilogue=kernels.GELU, **sums), torch.nn.functional.gelu(layer), **close)
    gate, up = rms.chunk(2, -1)
    swiglu = multiply(12, norm=kernels.RMS_NORM, gain=gain, epsilon=1e-5, epilogue=kernels.SWIGLU)
    assert torch.allclose(swiglu, torch.nn.functional.silu(gate) * up, **close)
    before = torch.randn(2, 24, device=DEVICE)
    assert torch.allclose(multiply(out=before.clone(), epilogue=kernels.ADD), before + x @ weight.T, **close)


def test_prompts_use_the_kernels(monkeypatch):
    decoder, ids = build_decoder("llama", quantized="int8"), torch.randint(40, (1, 9), device=DEVICE)
    result = decoder.all_logits(ids)
    monkeypatch.setattr(matrices, "uses_triton", lambda device: False)
    assert torch.allclose(result, decoder.all_logits(ids), rtol=1e-4, atol=1e-4)
