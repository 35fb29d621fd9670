"""Import: bit for bit what was exported, and what is no export is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cm3leon.checkpoint.convert import import_export
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.config import load_config


def test_import_gives_every_bit_back(family, tmp_path):
    folder, comparison = import_export(family.export, tmp_path / "back")
    assert folder == tmp_path / "back/checkpoints/step-00000003"
    reader = CheckpointReader(folder)
    assert reader.names == family.reader.names
    for name in reader.names:
        assert torch.equal(reader.read(name), family.reader.read(name)), name
    assert reader.state == family.reader.state and reader.vocabulary == family.reader.vocabulary
    assert reader.config.model == family.config.model
    assert load_config(tmp_path / "back/config.yaml").output == str(tmp_path / "back")
    assert comparison.passed and comparison.sequences == {"random": 1, "real": 1}


@pytest.fixture
def export(tmp_path, family):
    return shutil.copytree(family.export, tmp_path / "export")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rename_first(weights):
    name = sorted(weights)[0]
    weights[name + "x"] = weights.pop(name)


def spoil(weights):
    weights[sorted(weights)[3]][..., 0] = torch.nan


def lengthen(weights):
    name = sorted(weights)[0]
    weights[name] = torch.cat([weights[name], weights[name]])


@pytest.mark.parametrize("family", ["opt-relu", "qwen3"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(sorted(weights)[1]), "configuration: 1 missing"),
        (lambda weights: weights.update(extra=torch.ones(3)), r"configuration: 1 unknown \(extra\)"),
        (rename_first, "1 missing .* and 1 unknown"),
        (spoil, "has NaN or infinite values"),
        (lengthen, r"has shape .* is required"),
    ],
)
def test_other_weights_are_refused(tmp_path, export, change, message):
    change_weights(export, change)
    with pytest.raises(ValueError, match=message):
        import_export(export, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


@pytest.mark.parametrize("family", ["opt-relu"], indirect=True)
def test_what_is_no_export_is_refused(tmp_path, export):
    def fails(message):
        with pytest.raises(ValueError, match=message):
            import_export(export, tmp_path / "back")
        assert not (tmp_path / "back").exists()

    with pytest.raises(ValueError, match=r"is no export: it has no cm3leon.json"):
        import_export(tmp_path, tmp_path / "back")
    account = json.loads((export / "cm3leon.json").read_text())
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"ffn_dim": 64}))
    fails(r"config.json has ffn_dim 64, the configuration in cm3leon.json asks for 128")
    (export / "config.json").write_text("{")
    fails("config.json is not valid JSON")
    (export / "config.json").write_text(json.dumps(config))
    for change, message in (
        ({"format": 1}, "is of format 1, not 2"),
        ({"config": {"model": {"width": 3}}}, "does not hold the run's configuration"),
        ({"config": {"model": {"layers": 0}}}, r"model.layers \(0\) must be at least 1"),
        ({"state": {"steps": 3}}, "does not hold the run's configuration and state"),
    ):
        (export / "cm3leon.json").write_text(json.dumps(account | change))
        fails(message)
    (export / "cm3leon.json").write_text(json.dumps(account))
    weights = (export / "model.safetensors").read_bytes()
    (export / "model.safetensors").write_bytes(weights[:-100])
    fails("model.safetensors cannot be read")
    (export / "model.safetensors").write_bytes(weights)
    (export / "text.model").write_bytes((export / "text.model").read_bytes() + b"\x00")
    fails("text.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


@pytest.mark.parametrize("family", ["opt-relu"], indirect=True)
def test_a_run_folder_is_never_replaced(tmp_path, family):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="run already exists"):
        import_export(family.export, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == "{}\n"
