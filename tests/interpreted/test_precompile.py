"""compile_steps launches the same kernels as a real step."""

import threading

import pytest
import torch

from megatron_cm3leon.generation import fused_step, noise_kernel, products
from megatron_cm3leon.generation.fused_step import FusedStep
from megatron_cm3leon.generation.precompile import compile_in_background, compile_steps
from tests.interpreted.models import DEVICE, build_decoder

KERNELS = {
    fused_step: ("embed_kernel", "attend_kernel", "combine_kernel", "finish_step_kernel"),
    products: ("multiply_kernel",),
    noise_kernel: ("gumbel_kernel",),
}


class Recorder:
    """Wraps a kernel and records the properties by which Triton compiles: types, constants, multiples of 16, ones."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            kinds = tuple(self.describe(argument) for argument in arguments)
            self.launches.add((self.name, kinds, tuple(sorted(constants.items()))))
            return self.kernel[grid](*arguments, **constants)

        return launch

    @staticmethod
    def describe(argument):
        if isinstance(argument, torch.Tensor):
            return str(argument.dtype)
        return (argument == 1, argument % 16 == 0) if isinstance(argument, int) else "float"


@pytest.mark.parametrize(("family", "dtype"), [("opt", "fp32"), ("qwen3", "int8"), ("llama", "bf16")])
@torch.inference_mode()
def test_a_step_launches_no_other_kernels(family, dtype, monkeypatch):
    launches = set()
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), name, launches))
    torch_dtype = torch.bfloat16 if dtype == "bf16" or (dtype == "int8" and DEVICE == "cuda") else torch.float32
    decoder = build_decoder(
        family,
        hidden=32,
        inner=32,
        layers=2,
        vocabulary=48,
        dtype=torch_dtype,
        quantized="int8" if dtype == "int8" else None,
    )
    compile_steps(decoder.shape, dtype, decoder.device, 32, 160, (1, 2))
    compiled = set(launches)
    launches.clear()
    for count in (1, 2):
        cache = decoder.build_cache(count, 160, flat=False)
        fused = FusedStep(decoder)
        ids = torch.ones(count, dtype=torch.long, device=DEVICE)
        fused.logits(fused.advance(ids, cache), decoder.head(torch.arange(16, 48)))
    keys, groups = torch.ones(1, 2, dtype=torch.long, device=DEVICE), torch.arange(16, device=DEVICE)
    noise_kernel.write_noise(keys, keys[0, :1], groups, torch.zeros(1, 64, device=DEVICE))
    assert len(launches) >= 8 and launches <= compiled


def test_the_caller_gets_the_error_of_the_thread(monkeypatch):
    threads = []

    def fail():
        threads.append(threading.current_thread())
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), compile_in_background(fail, torch.device("cuda")):
        pass
    assert threads and threads[0] is not threading.current_thread()
    with compile_in_background(fail, torch.device("cpu")):
        assert len(threads) == 1
