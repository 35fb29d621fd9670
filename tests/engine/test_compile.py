"""train.compile: one graph without breaks for all layers, and an error where compilation cannot work."""

import json

import pytest
import torch

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from tests.distributed.launch import torchrun


def run(ranks: int, *cases: str) -> dict:
    done = torchrun(ranks, "tests/engine/check_compile.py", *cases)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("results "))[8:])


@pytest.fixture(scope="module")
def results():
    return run(1, "llama", "recompute=selective", "recompute=full", "dropout", "fp8")


@pytest.mark.parametrize("case", ["llama", "recompute=selective", "fp8"])
def test_all_layers_use_one_graph(results, case):
    compiled, plain = results[f"{case} true"], results[f"{case} false"]
    assert (compiled["graphs"], compiled["breaks"]) == (1, 0)
    assert plain["graphs"] == 0
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert compiled["evaluated"] == pytest.approx(plain["evaluated"], rel=1e-6)


def test_full_recomputation_adds_a_graph_without_gradients(results):
    compiled, plain = results["recompute=full true"], results["recompute=full false"]
    assert (compiled["graphs"], compiled["breaks"]) == (2, 0)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-6)


def test_dropout_breaks_the_graph_at_attention_and_the_loss_falls(results):
    compiled = results["dropout true"]
    assert compiled["breaks"] >= 1 and compiled["graphs"] >= 2
    assert compiled["losses"][-1] < compiled["losses"][0]


@pytest.mark.slow
def test_a_compiled_layer_runs_after_its_weights_are_gathered():
    """With many buckets, megatron-core waits for weights in hooks in the layer, which a graph cannot contain."""
    results = run(2, "zero=1")
    assert results["zero=1 true"]["losses"] == pytest.approx(results["zero=1 false"]["losses"], rel=1e-6)


def test_a_failing_compiler_is_reported_with_the_remedy(tmp_path, monkeypatch):
    import torch._inductor.config

    from megatron_cm3leon.engine.compile import compile_layers

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "absent"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # an empty cache
    with pytest.raises(ValueError) as error:
        compile_layers([], load_config(None, ["train.compile=true"]), torch.device("cpu"))
    start = "train.compile (True) needs a compiler that works on this machine, and a trial on cpu ended with "
    assert str(error.value).startswith(start)
    assert str(error.value).endswith("; install g++ or name a compiler in CXX, or use train.compile=false.")


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        ([], "cpu", False),
        ([], "cuda", True),
        (["train.compile=true"], "cpu", True),
        (["train.compile=false"], "cuda", False),
        (["train.engine=deepspeed", "parallel.zero=2"], "cuda", True),
        (["train.engine=deepspeed", "parallel.zero=3"], "cuda", False),
    ],
)
def test_layers_are_compiled_by_default_on_a_gpu(overrides, device, expected):
    from megatron_cm3leon.engine.compile import wants_compile

    config = load_config(None, overrides)
    validate_config(config)
    assert wants_compile(config, torch.device(device)) is expected


def test_compilation_with_zero_3_is_rejected():
    with pytest.raises(
        ValueError, match=r"train\.compile \(True\) needs parallel\.zero of 0, 1 or 2 .* parallel\.zero=2"
    ):
        validate_config(load_config(None, ["train.compile=true", "train.engine=deepspeed", "parallel.zero=3"]))
