"""DeepSpeed's settings: derived values, keys that a user's JSON may add, and keys that are rejected."""

import json
from importlib import util

import pytest

from megatron_cm3leon.config import validation
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.engine.deepspeed_settings import build_settings

BASE = ["train.engine=deepspeed", "train.global_batch_size=32", "train.micro_batch_size=2"]


def make_settings(overrides=(), data_size=2, extra=None, folder=None):
    overrides = [*BASE, *overrides]
    if extra is not None:
        path = folder / "user.json"
        path.write_text(extra if isinstance(extra, str) else json.dumps(extra))
        overrides.append(f"deepspeed.json={path}")
    config = load_config(None, overrides)
    validate_config(config)
    return build_settings(config, data_size)


def test_settings_follow_from_the_configuration():
    found = make_settings(["parallel.zero=2", "deepspeed.offload_optimizer=true", "optimizer.clip=0.5"])
    assert found["train_batch_size"] == 32
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 8
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"]["enabled"] is True
    assert found["zero_optimization"]["stage"] == 2
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in found["zero_optimization"]


def test_a_json_of_the_user_is_merged(tmp_path):
    extra = {
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 5, "offload_param": {"pin_memory": True}},
        "train_batch_size": "auto",
        "communication_data_type": "auto",
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95], "weight_decay": 0.1}},
        "wall_clock_breakdown": True,
    }
    found = make_settings(["parallel.zero=3", "deepspeed.offload_parameters=true"], extra=extra, folder=tmp_path)
    assert found["zero_optimization"]["stage3_max_live_parameters"] == 5
    assert found["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert found["wall_clock_breakdown"] is True
    assert found["train_batch_size"] == 32
    assert found["communication_data_type"] == "fp32"
    assert "optimizer" not in found


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size (64) contradicts train.global_batch_size, which requires 32;"),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu (1) contradicts train.micro_batch_size, which requires 2;",
        ),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps (1) contradicts train.global_batch_size"),
        ({"gradient_clipping": 2.0}, "gradient_clipping (2.0) contradicts optimizer.clip, which requires 1.0;"),
        ({"bf16": {"enabled": False}}, "bf16.enabled (False) contradicts train.precision, which requires True;"),
        ({"fp16": {"enabled": True}}, "fp16.enabled (True) contradicts train.precision, which requires False;"),
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage (3) contradicts parallel.zero, which requires 1",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device ('nvme') contradicts deepspeed.offload_optimizer, which "
            "requires 'none'; remove it from the file or change deepspeed.offload_optimizer.",
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            "optimizer.type ('Lamb') contradicts section optimizer, which requires 'AdamW'",
        ),
        (
            {"optimizer": {"params": {"lr": 1}}},
            "optimizer.params.lr (1) contradicts section optimizer, which requires 0.0006",
        ),
        (
            {"optimizer": {"params": {"amsgrad": True}}},
            "optimizer.params.amsgrad (True) contradicts section optimizer, which requires False",
        ),
        (
            {"optimizer": {"params": {"max_coeff": 10}}},
            "optimizer.params.max_coeff (10) is not a field of section optimizer",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "is set by section schedule; remove it from the file."),
        (
            {"zero_optimization": {"overlap_comm": False}},
            "zero_optimization.overlap_comm (False) contradicts parallel.overlap, which requires True; remove it",
        ),
        ({"zero_optimization": {"round_robin_gradients": True}}, "contradicts parallel.zero, which requires False"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size (2) contradicts parallel.tensor, which requires 1"),
        ({"tensor_parallel": {"tp": {"tp_size": 1}}}, "is set by parallel.tensor; remove it from the file."),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode (False) contradicts section"),
        ({"zero_optimization": True}, "zero_optimization (True) must be an object of settings; correct it."),
        ({"bf16": True}, "bf16 (True) must be an object of settings; correct it."),
        ("{", "is not valid JSON"),
        ("[1]", "must contain an object of settings, not [1]; correct the file."),
    ],
)
def test_a_contradiction_is_rejected_and_named(tmp_path, extra, message):
    with pytest.raises(ValueError) as error:
        make_settings(["parallel.zero=1"], extra=extra, folder=tmp_path)
    assert message in str(error.value)
    assert "user.json" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "data_size", "extra"),
    [
        (["parallel.zero=2"], 1, {"zero_optimization": {"stage": 2, "overlap_comm": True}}),
        (["parallel.zero=2"], 1, {"zero_optimization": {"overlap_comm": False}}),
        (["parallel.zero=2", "parallel.overlap=false"], 1, {"zero_optimization": {"overlap_comm": True}}),
        (["parallel.zero=2", "parallel.overlap=false"], 2, {"zero_optimization": {"overlap_comm": False}}),
        (["parallel.zero=0"], 2, {"zero_optimization": {"stage": 0, "overlap_comm": False}}),
        (["parallel.zero=2"], 1, {"zero_optimization": {"round_robin_gradients": True}}),
        (["parallel.zero=3"], 2, {"zero_optimization": {"round_robin_gradients": True}}),
        (["parallel.zero=1"], 2, {"tensor_parallel": {"autotp_size": 0}, "scheduler": None}),
        (["parallel.zero=1", "parallel.tensor=2"], 2, {"tensor_parallel": {"autotp_size": 2}, "scheduler": {}}),
        (["parallel.zero=1"], 2, {"optimizer": {"type": "Adam", "params": {"torch_adam": False, "amsgrad": False}}}),
        (["parallel.zero=1"], 2, {"optimizer": {"type": "adamw", "params": {"bias_correction": True, "lr": 6e-4}}}),
        (
            ["parallel.zero=2"],
            2,
            {"zero_optimization": {"offload_optimizer": {"device": "none"}, "cpu_offload": False}},
        ),
        (
            ["parallel.zero=2", "deepspeed.offload_optimizer=true"],
            2,
            {"zero_optimization": {"offload_optimizer": None}},
        ),
        (["parallel.zero=2"], 2, {"zero_optimization": None, "bf16": {}, "gradient_clipping": 1, "fp16": None}),
    ],
)
def test_keys_with_the_same_effect_are_accepted(tmp_path, overrides, data_size, extra):
    assert make_settings(overrides, data_size, extra, tmp_path) == make_settings(overrides, data_size)


def test_a_missing_json_file_is_named():
    with pytest.raises(ValueError, match=r"deepspeed\.json \(absent\.json\) does not exist"):
        make_settings(["deepspeed.json=absent.json"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.zero=4"], "parallel.zero (4) must be one of: 0, 1, 2, 3."),
        (["parallel.zero=2"], "use parallel.zero=1 or train.engine=deepspeed."),
        (["deepspeed.offload_optimizer=true"], "deepspeed.offload_optimizer (True) needs train.engine=deepspeed;"),
        (["deepspeed.json=a.json"], "deepspeed.json (a.json) needs train.engine=deepspeed;"),
        ([*BASE, "parallel.pipeline=2"], "parallel.pipeline (2) must be 1 with train.engine=deepspeed; use"),
        ([*BASE, "parallel.context=2"], "parallel.context (2) must be 1 with train.engine=deepspeed; use"),
        ([*BASE, "parallel.sequence=true"], "parallel.sequence (True) must be False with train.engine=deepspeed; use"),
        (
            [*BASE, "deepspeed.offload_optimizer=true"],
            "needs parallel.zero of 1, 2 or 3; it is 0: use parallel.zero=1.",
        ),
        (
            [*BASE, "parallel.zero=2", "deepspeed.offload_parameters=true"],
            "deepspeed.offload_parameters (True) needs parallel.zero=3, which partitions the weights; it is 2.",
        ),
    ],
)
def test_combinations_that_no_engine_supports_are_rejected(overrides, message):
    with pytest.raises(ValueError) as error:
        validate_config(load_config(None, overrides))
    assert message in str(error.value)


def test_a_missing_package_is_named_when_a_run_starts(monkeypatch):
    monkeypatch.setattr(validation, "find_spec", lambda name: None)
    config = load_config(None, BASE)
    validate_config(config)  # reading a checkpoint needs no package
    with pytest.raises(ValueError, match=r"pip install -e \.\[deepspeed\]"):
        validate_config(config, 2)
    assert util.find_spec("deepspeed"), "the test environment has deepspeed"
