"""Training step: values read from the device, class and state of AdamW, norm and clipping, memory for a save."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cm3leon.checkpoint.retention import STEPS_AHEAD, saves_soon
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.engine.base import DROPOUT_SEEDING
from megatron_cm3leon.training.setup import check_dropout_seeding
from tests.data.corpora import make_vocabulary
from tests.distributed.launch import torchrun


@pytest.fixture(scope="module")
def results():
    """Results of check_step.py."""
    done = torchrun(1, "tests/engine/check_step.py")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("results "))[8:])


def test_a_step_reads_only_its_sums_from_the_device(results):
    """The sums are read as one list, without an operator."""
    assert results["reads"] == [0, 0]


def test_memory_for_a_save_is_reserved_shortly_before_it(results):
    assert results["reserved"] == {"built": False, "far": False, "near": True}


def test_adamw_comes_from_an_installed_library_or_torch(results):
    assert results["classes"] == {"auto": "GroupStepAdamW", "torch": "FusedAdamW"}


@pytest.mark.parametrize("pair", ["installed to torch", "torch to installed"])
def test_each_adamw_resumes_from_a_checkpoint_of_the_other(results, pair):
    assert results["losses"][pair] == pytest.approx(results["losses"]["torch"], rel=1e-6)


def test_a_resumed_run_keeps_its_dropout_seeding(results):
    """The seeds of (seed 1234, step 7) on rank 0 are fixed: changing them requires a new version of the seeding."""
    older, newer = results["dropout 1"], results["dropout 2"]
    assert older["resumed"] == older["losses"][2:] and newer["resumed"] == newer["losses"][2:]
    assert older["losses"] != newer["losses"] and newer["newest"] == 2
    assert (older["seed"], newer["seed"]) == (338633693, 3920288169382061327)


def test_an_older_dropout_seeding_is_logged_and_a_newer_one_is_rejected(caplog):
    caplog.set_level("INFO")
    folder, config, without_dropout = Path("run/step-00000002"), load_config(None, ["model.dropout=0.1"]), load_config()
    check_dropout_seeding(folder, config, TrainState(dropout_seeding=DROPOUT_SEEDING))
    check_dropout_seeding(folder, without_dropout, TrainState())
    assert not caplog.messages
    check_dropout_seeding(folder, config, TrainState())
    assert "keep the seeding of the start of this run (version 1:" in caplog.text
    with pytest.raises(ValueError, match=r"dropout_seeding \(3\) in run/step-00000002/state.json must be at most 2"):
        check_dropout_seeding(folder, config, TrainState(dropout_seeding=3))


def test_without_the_cpu_substitutes_adamw_is_torchs_fused_adamw():
    """As on a GPU, where megatron-core would build torch's AdamW with the defaults of torch."""
    script = """
from megatron.core import optimizer as core
from megatron_cm3leon.engine.optimizer import FusedAdamW, choose_adamw
import torch
choose_adamw("auto")
assert core.Adam is FusedAdamW and not core.USING_PYTORCH_OPTIMIZER
assert core.Adam([torch.zeros(2, requires_grad=True)], lr=1.0, adam_w_mode=True).defaults["fused"]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_step_count_of_adam_is_on_the_device_of_the_weights():
    """`meta` represents a device other than the CPU."""
    from megatron_cm3leon.engine.optimizer import load_moments

    main = torch.zeros(3, device="meta", requires_grad=True)
    adam = torch.optim.AdamW([main])
    load_moments(adam, main, {"exp_avg": torch.zeros_like(main)}, updates=7)
    step = adam.state[main]["step"]
    assert (step.device, step.dtype, step.shape) == (main.device, torch.float32, ())


def test_norm_and_clipping_equal_those_of_torch():
    from megatron_cm3leon.engine.optimizer import clip_gradients, squared_norm

    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator) for shape in ((40, 30), (7,), (1,))]
    theirs = [torch.zeros_like(gradient).requires_grad_() for gradient in ours]
    for parameter, gradient in zip(theirs, ours, strict=True):
        parameter.grad = gradient.clone()
    norm = float(squared_norm(ours, torch.device("cpu")).sqrt())
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 0.5)), rel=1e-6)
    clip_gradients(ours, norm, 0.0)
    clip_gradients(ours, norm, 2 * norm)
    assert float(squared_norm(ours, torch.device("cpu")).sqrt()) == norm, (
        "a limit of 0, or one above the norm, must not change gradients"
    )
    clip_gradients(ours, norm, 0.5)
    for gradient, parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)
    assert float(squared_norm([], torch.device("cpu"))) == 0


class OperatorRecorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_sum_losses_copies_nothing_to_the_device():
    from megatron_cm3leon.engine.step import sum_losses

    labels, weights = torch.tensor([[1, 2]]), torch.tensor([[1.0, 0.5]])
    with OperatorRecorder() as recorder:
        sums = sum_losses(weights * 3, labels, weights, 2.5, make_vocabulary())
    assert sums[0] == 4.5 and sums[-1] == 2.5
    assert "aten.lift_fresh.default" not in recorder.names, "a tensor was built from a number on the host"


@pytest.mark.parametrize(
    ("step", "overrides", "soon"),
    [
        (0, (), False),
        (1000 - STEPS_AHEAD - 1, (), False),
        (1000 - STEPS_AHEAD, (), True),
        (0, ("train.stop_after=5",), True),
        (0, ("checkpoint.log_spaced=true",), True),
        (0, ("checkpoint.interval=20",), True),
    ],
)
def test_a_save_is_expected_before_an_interval_or_the_end(step, overrides, soon):
    config = load_config(None, ["train.steps=5000", *overrides])
    assert saves_soon(step, config) is soon


def test_kernels_are_described():
    from megatron_cm3leon.engine.kernels import describe_kernels

    config = load_config(None, ["model.layers=1", "model.hidden_size=64", "model.heads=2", "data.seq_length=32"])
    validate_config(config)
    found = describe_kernels(config, torch.device("cpu"), torch.optim.AdamW, compiled=True, accumulates=True)
    assert found["attention"].startswith("torch, ") and found["AdamW"] == "torch, fused"
    assert found["layers"] == "compiled, one graph"
    assert found["weight gradients"] == "product in bf16, then added in fp32"
    assert found["cross-entropy"] == "torch"
    config.data.attention, config.train.head_chunk = "sample", 256
    found = describe_kernels(config, torch.device("cpu"), torch.optim.AdamW, compiled=False, accumulates=False)
    assert found["attention"] == "per sample, masked" and found["cross-entropy"] == "torch, 256 tokens at a time"
    found = describe_kernels(config, torch.device("cuda"), torch.optim.AdamW, compiled=False, accumulates=True)
    assert found["attention"] == "per sample, FlexAttention"
    assert found["weight gradients"] == "accumulated in the product"
    apex = type("FusedAdam", (SimpleNamespace,), {"__module__": "apex.optimizers"})
    found = describe_kernels(config, torch.device("cpu"), apex, compiled=False, accumulates=False)
    assert found["AdamW"] == "apex.optimizers.FusedAdam"
