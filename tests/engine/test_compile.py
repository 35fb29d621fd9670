"""train.compile: one graph for all layers, no break in it, and a sentence where it cannot work."""

import json

import pytest
import torch

from megatron_cm3leon.config import load_config
from tests.distributed.launch import torchrun


def run(ranks: int, *cases: str) -> dict:
    done = torchrun(ranks, "tests/engine/check_compile.py", *cases)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("seen "))[5:])


@pytest.fixture(scope="module")
def seen():
    return run(1, "llama", "recompute=selective", "recompute=full", "dropout", "fp8")


@pytest.mark.parametrize("case", ["llama", "recompute=selective", "fp8"])
def test_one_graph_serves_all_layers(seen, case):
    compiled, plain = seen[f"{case} true"], seen[f"{case} false"]
    assert (compiled["graphs"], compiled["breaks"]) == (1, 0)
    assert plain["graphs"] == 0
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert compiled["evaluated"] == pytest.approx(plain["evaluated"], rel=1e-6)


def test_recomputation_of_layers_adds_the_graph_without_gradients(seen):
    compiled, plain = seen["recompute=full true"], seen["recompute=full false"]
    assert (compiled["graphs"], compiled["breaks"]) == (2, 0)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-6)


def test_dropout_divides_the_graph_at_the_attention_and_trains(seen):
    compiled = seen["dropout true"]
    assert compiled["breaks"] >= 1 and compiled["graphs"] >= 2
    assert compiled["losses"][-1] < compiled["losses"][0]


@pytest.mark.slow
def test_gathered_weights_are_waited_for_before_a_compiled_layer():
    """Weights that come in many parts: megatron-core waits in hooks inside the layer, which a graph cannot hold."""
    seen = run(2, "zero=1")
    assert seen["zero=1 true"]["losses"] == pytest.approx(seen["zero=1 false"]["losses"], rel=1e-6)


def test_a_compiler_that_fails_is_named_with_the_remedy(tmp_path, monkeypatch):
    import torch._inductor.config

    from megatron_cm3leon.engine.compile import compile_layers

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "absent"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # without what an earlier run compiled
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
def test_layers_are_compiled_on_a_gpu_unless_told_otherwise(overrides, device, expected):
    from megatron_cm3leon.engine.compile import wants_compile

    config = load_config(None, overrides)
    config.validate()
    assert wants_compile(config, torch.device(device)) is expected


def test_weights_gathered_inside_a_layer_are_refused():
    with pytest.raises(
        ValueError, match=r"train\.compile \(True\) needs parallel\.zero of 0, 1 or 2 .* parallel\.zero=2"
    ):
        load_config(None, ["train.compile=true", "train.engine=deepspeed", "parallel.zero=3"]).validate()
