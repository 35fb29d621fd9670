"""CPU substitutes: megatron-core's RNG tracker works, and torch stays unchanged for other callers."""

import subprocess
import sys

SCRIPT = """
import torch
from megatron_cm3leon.engine import cpu_backend
cpu_backend.install()
from megatron.core.tensor_parallel import random
import megatron.core.optimizer.clip_grads as clip_grads

tracker = random.CudaRNGStatesTracker()
tracker.add("a", 1)
tracker.add("b", 2)
with tracker.fork("a"):
    first = torch.rand(3)
with tracker.fork("b"):
    other = torch.rand(3)
with tracker.fork("a"):
    second = torch.rand(3)
expected = torch.rand(6, generator=torch.Generator().manual_seed(1))
assert torch.equal(torch.cat([first, second]), expected), "a fork continues where the last one ended"
assert not torch.equal(first, other)
torch.manual_seed(5)
before = torch.rand(2)
torch.manual_seed(5)
with tracker.fork("b"):
    torch.rand(1)
assert torch.equal(torch.rand(2), before), "a fork does not change the default generator"

assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
assert torch.zeros(1).type() == "torch.FloatTensor", "other callers get the real type of a tensor"
try:
    torch.zeros(1).cuda()
except (AssertionError, RuntimeError):
    pass
else:
    raise AssertionError("cuda() must fail without a GPU for other callers")
print("passed")
"""


def test_substitutes_affect_megatron_core_only():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "passed\n"
    assert "CPU RNG state changed" not in done.stderr
