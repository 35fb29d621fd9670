"""fp8 matrix products: rounding, comparison with the product of torch, and settings that are rejected."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.model.fp8 import (
    BACKWARD,
    FORWARD,
    multiply,
    quantize,
    quantize_both_ways,
    quantize_transposed,
    require_fp8,
)
from megatron_cm3leon.model.linear import ALONE, _Linear

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("dtype", "mantissa_bits"), [(FORWARD, 3), (BACKWARD, 2)])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 3e4])
def test_quantization_error_is_within_the_mantissa_of_the_type(dtype, mantissa_bits, scale):
    matrix = random_matrix(16, 64) * scale
    found = quantize(matrix, dtype)
    assert torch.frexp(found.inverse).mantissa == 0.5  # a power of two
    largest_value = torch.finfo(dtype).max
    assert largest_value / 2 < found.values.float().abs().max() <= largest_value
    values, exact = found.values.float() * found.inverse, matrix.float()
    normal = exact.abs() > found.inverse * torch.finfo(dtype).smallest_normal
    assert ((values - exact).abs() <= exact.abs() * 2.0 ** -(mantissa_bits + 1))[normal].all()


def test_zeros_stay_zero_and_non_finite_numbers_become_nan():
    assert not quantize(torch.zeros(2, 2), FORWARD).values.float().any()
    for value in (torch.inf, torch.nan):
        matrix = torch.ones(2, 2)
        matrix[0, 1] = value
        assert quantize(matrix, BACKWARD).values.float()[0, 1].isnan()


def test_a_part_of_a_tensor_is_rounded_like_the_full_tensor():
    full = random_matrix(16, 64)
    part = full[:, :16] / 4 + 0
    full[:, :16] = part
    ours, theirs = quantize(part, FORWARD), quantize(full, FORWARD)
    assert ours.inverse < theirs.inverse
    values = theirs.values.float()[:, :16]
    normal = values.abs() >= torch.finfo(FORWARD).smallest_normal
    assert torch.equal((ours.values.float() * ours.inverse)[normal], (values * theirs.inverse)[normal])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("left_type", [FORWARD, BACKWARD])
def test_the_product_on_a_cpu_equals_that_of_torch(left_type, dtype):
    left, right = quantize(random_matrix(16, 32), left_type), quantize(random_matrix(48, 32, seed=1) * 9, FORWARD)
    options = {"scale_a": left.inverse, "scale_b": right.inverse, "out_dtype": dtype}
    expected = torch._scaled_mm(left.values, right.values.t(), **options)
    torch.testing.assert_close(multiply(left, right, dtype), expected, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("accumulates", [False, True])
def test_output_and_gradients_are_close_to_the_exact_ones(accumulates):
    """Within the rounding error of sums of 64 to 128 products of numbers with 3 and 2 mantissa bits."""
    input, weight = random_matrix(32, 2, 128).requires_grad_(), random_matrix(96, 128, seed=1).requires_grad_()
    gradient = random_matrix(32, 2, 96, seed=2) * 1e-4
    main_grad = torch.ones(96, 128) if accumulates else None
    found = _Linear.apply(input, weight, main_grad, ALONE, "", False, True)
    input_gradient, weight_gradient = torch.autograd.grad(found, (input, weight), gradient)
    weight_gradient = main_grad - 1 if accumulates else weight_gradient
    flat, output_gradient = input.detach().double().view(64, 128), gradient.double().view(64, 96)
    for result, exact in (
        (found.view(64, 96), flat @ weight.detach().double().t()),
        (input_gradient.view(64, 128), output_gradient @ weight.detach().double()),
        (weight_gradient, output_gradient.t() @ flat),
    ):
        error = (result.detach().double() - exact).norm() / exact.norm()
        assert 0.005 < error < 0.08, error


def test_quantize_both_ways_returns_the_matrix_and_its_transpose():
    matrix = random_matrix(48, 32)[:, ::2]  # not contiguous
    rows, columns = quantize_both_ways(matrix, FORWARD)
    assert torch.equal(rows.values.view(torch.uint8), columns.values.t().view(torch.uint8))
    for found, expected in ((quantize(matrix, FORWARD), rows), (quantize_transposed(matrix, FORWARD), columns)):
        assert found.values.is_contiguous() and found.values.shape == expected.values.shape
        assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert found.inverse == expected.inverse


def test_a_weight_kept_in_fp8_gives_the_same_bits_as_a_converted_one():
    results = []
    for keeps_weight in (False, True):
        input, weight = random_matrix(32, 2, 128).requires_grad_(), random_matrix(96, 128, seed=1).requires_grad_()
        (values, inverse), (transposed, _) = quantize_both_ways(weight.detach(), FORWARD)
        kept = (values, transposed, inverse) if keeps_weight else ()
        output = _Linear.apply(input, weight, None, ALONE, "", False, True, True, *kept)
        output.backward(random_matrix(32, 2, 96, seed=2))
        results.append((output, input.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_the_input_is_saved_for_the_backward_pass_in_fp8():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        _Linear.apply(random_matrix(32, 128), random_matrix(96, 128).requires_grad_(), None, ALONE, "", False, True)
    assert (FORWARD, (128, 32)) in [(each.dtype, tuple(each.shape)) for each in saved]
    assert (torch.bfloat16, (32, 128)) not in [(each.dtype, tuple(each.shape)) for each in saved]


@needs_triton
def test_the_cuda_kernel_gives_the_same_bits_as_the_cpu():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported
    command = [sys.executable, "-m", "tests.model.check_fp8_kernels"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "kernels agree" in done.stdout, done.stderr


@needs_triton
@pytest.mark.parametrize("kind", ["*fp8e4nv", "*fp8e5"])
def test_the_cuda_kernel_compiles_for_a_gpu(kind):
    from megatron_cm3leon.model import fp8_kernels
    from tests.generation.test_triton import compile_kernel

    types = {"matrix": "*bf16", "largest": "*bf16", "values": kind, "transposed": kind, "inverse": "*fp32"}
    types |= {"rows": "i32", "columns": "i32"}
    constants = {"TOP": 448.0, "SMALLEST": 2.0**-64, "ROWS": True, "TRANSPOSED": True, "TILE": fp8_kernels.TILE}
    assembly = compile_kernel(fp8_kernels._convert, f"conversion to {kind}", types, constants, fp8_kernels.WARPS)
    assert "cvt.rn.satfinite" in assembly  # one instruction, rounds to the nearest
    assert "ld.global.v4" in assembly and "st.global.v4" in assembly


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=fp32"], r"train.fp8 \(True\) needs train.precision=bf16, .*; it is fp32: use .*"),
        (["model.hidden_size=72", "model.heads=9"], r"model.hidden_size \(72\) must be divisible by 16 .*fp8=false"),
        (["model.ffn_hidden_size=200"], r"model.ffn_hidden_size / parallel.tensor \(200\) must be .* by 16"),
        (["data.seq_length=40"], r"train.micro_batch_size x data.seq_length / parallel.context \(40\) must be .* 16"),
    ],
)
def test_fp8_is_rejected_with_unsupported_settings(overrides, message):
    with pytest.raises(ValueError, match=message):
        validate_config(load_config(None, ["train.fp8=true", *overrides]), 1)


def test_fp8_is_rejected_on_a_gpu_that_lacks_it():
    require_fp8((8, 9))
    with pytest.raises(ValueError, match=r"train.fp8 \(True\) needs a GPU of compute capability 8.9 .* has 8.0: use"):
        require_fp8((8, 0))
