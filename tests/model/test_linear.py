"""Linear layers: gradients equal those of torch and are added to the fp32 buffer, eagerly and in a compiled function.

The table of layouts (tests/distributed) compares their communication between ranks.
"""

import pytest
import torch

from megatron_cm3leon.model.linear import ALONE, _Linear, accumulate_weight_gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_weight_gradient_is_added_in_fp32(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    gradient, input = (torch.randn(40, width, generator=generator).to(dtype) for width in (6, 9))
    buffer = torch.full((6, 9), 1000.0)
    accumulate_weight_gradient(buffer, gradient, input)
    expected = 1000 + gradient.double().t() @ input.double()
    assert buffer.dtype == torch.float32
    torch.testing.assert_close(buffer.double(), expected, rtol=1e-6, atol=40 * tolerance)


def differentiate(function, accumulates: bool):
    """(output, gradient of the input, gradient of the weight from autograd, buffer) of `function` with a weight."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(5, 2, 4, generator=generator).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    buffer = torch.ones(3, 4) if accumulates else None
    output = function(input, weight, buffer)
    output.sin().sum().backward()
    return output.detach(), input.grad, weight.grad, buffer


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_equal_those_of_torch(compiled):
    def apply_linear(input, weight, buffer):
        return _Linear.apply(input, weight, buffer, ALONE, "", False)

    function = torch.compile(apply_linear, backend="aot_eager", fullgraph=True) if compiled else apply_linear
    theirs = differentiate(lambda input, weight, _: input @ weight.t(), False)
    found = differentiate(function, False)
    for result, reference in zip(found[:3], theirs[:3], strict=True):
        torch.testing.assert_close(result, reference)
    found = differentiate(function, True)
    for result, reference in zip((*found[:2], found[3]), (*theirs[:2], 1 + theirs[2]), strict=True):
        torch.testing.assert_close(result, reference)
    assert found[2].shape == theirs[2].shape  # megatron-core's hooks wait for a gradient; its values are not read


@pytest.mark.parametrize("in_fp8", [False, True])
def test_a_frozen_weight_keeps_no_input(in_fp8):
    generator = torch.Generator().manual_seed(0)
    values, weight = torch.randn(16, 2, 32, generator=generator), torch.randn(48, 32, generator=generator)
    dtype = torch.bfloat16 if in_fp8 else torch.float32
    gradients, saved = [], []
    for trains in (True, False):
        input = values.to(dtype).clone().requires_grad_()
        frozen = weight.to(dtype).clone().requires_grad_(trains)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            output = _Linear.apply(input, frozen, None, ALONE, "", False, in_fp8, trains)
        output.sin().sum().backward()
        gradients.append(input.grad)
        saved.append(sizes.count(input.numel()))
        assert (frozen.grad is not None) == trains
    assert torch.equal(*gradients) and saved == [1, 0]


def test_a_weight_shared_with_the_embedding_gets_no_second_gradient():
    found = differentiate(lambda *arguments: _Linear.apply(*arguments, ALONE, "", True), True)
    assert found[2] is None and float((found[3] - 1).abs().sum()) > 0


def test_gradients_of_all_micro_batches_in_a_pipeline_are_added():
    """A pipeline runs several forward passes before the first backward pass; each backward pass adds to `buffer`."""
    weight = torch.nn.Parameter(torch.ones(3, 4))
    buffer = torch.zeros(3, 4)
    function = torch.compile(lambda x: _Linear.apply(x, weight, buffer, ALONE, "", False), backend="aot_eager")
    outputs = [function(torch.full((2, 1, 4), float(scale), requires_grad=True)) for scale in (1, 2, 3)]
    for output in outputs:
        output.sum().backward()
    torch.testing.assert_close(buffer, torch.full((3, 4), 2.0 * (1 + 2 + 3)))
