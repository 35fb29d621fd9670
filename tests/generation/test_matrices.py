"""Matrices: each kind computes x W^T; int8 equals the product computed by hand."""

import pytest
import torch

from megatron_cm3leon.generation.matrices import (
    Int8CpuMatrix,
    Matrix,
    PackedMatrix,
    ScaledMatrix,
    quantize_rows,
    quantize_rows_fp8,
)
from megatron_cm3leon.generation.matrix_kinds import build_matrix

on_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not built in")


def test_each_row_is_quantized_by_its_largest_value():
    levels, scale = quantize_rows(torch.tensor([[1.27, -0.64, 0.0], [0.0, 0.0, 0.0], [-254.0, 3.0, 127.0]]))
    assert levels.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 2, 64]]
    assert scale[[0, 2]].tolist() == pytest.approx([0.01, 2.0])


@on_onednn
@pytest.mark.parametrize("batch", [1, 2, 17])
def test_int8_is_the_product_of_the_rounded_matrices(batch):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 24, generator=generator), torch.randn(batch, 24, generator=generator)
    weight[3] = 0
    x[0] *= 1e-3
    result = Int8CpuMatrix(weight)(x)
    (w, w_scale), (rows, x_scale) = quantize_rows(weight), quantize_rows(x)
    expected = (rows.double() @ w.double().T) * x_scale[:, None] * w_scale
    # A value half-way between two levels may be rounded up or down.
    assert (result - expected).abs().max() < 1.01 * (x_scale[:, None] * weight.abs().amax(1)).max()
    assert (result - expected).norm() < 1e-3 * expected.norm()
    assert (result - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()
    assert result[:, 3].abs().max() == 0


@on_onednn
def test_int8_of_a_row_does_not_depend_on_other_rows():
    x, matrix = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), Int8CpuMatrix(torch.eye(64)[:48])
    with_larger_rows = torch.cat([x, 1000 * x])
    assert torch.equal(matrix(with_larger_rows)[:5], matrix(x))
    assert matrix(torch.zeros(2, 3, 64)).abs().max() == 0 and matrix(torch.zeros(2, 3, 64)).shape == (2, 3, 48)


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_rows_fp8])
def test_weight_only_quantization(quantize):
    weight, x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)), torch.eye(16)
    levels, scale = quantize(weight)
    assert torch.allclose(ScaledMatrix(levels, scale)(x), (levels.float() * scale[:, None]).T)


def test_rows_are_quantized_to_fp8():
    """e4m3 has 4 significant bits, of which the first is 1, and its largest number is 448."""
    levels, scale = quantize_rows_fp8(torch.tensor([[4.48, -2.24, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    assert levels.float().tolist() == [[448, -224, 0, 96], [0, 0, 0, 0]] and scale[0].item() == pytest.approx(0.01)


@on_onednn
def test_the_kind_of_matrix_depends_on_size_and_dtype():
    large = torch.randn(1024, 512)
    assert type(build_matrix(large)) is PackedMatrix and type(build_matrix(large[:64])) is Matrix
    assert type(build_matrix(large, "int8")) is Int8CpuMatrix
    assert torch.allclose(build_matrix(large)(large[:3]), large[:3] @ large.T, atol=1e-3)
    assert build_matrix(large).bytes == 4 * large.numel() and build_matrix(large, "int8").bytes == large.numel()
