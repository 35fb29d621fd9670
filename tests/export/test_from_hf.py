"""Import: the same bits as exported; a folder that is not an export is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.export import import_export


def test_import_gives_the_same_bits(family, tmp_path):
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


UNSAVED_FILES = ("cm3leon.json", "text.model", "vocab.json", "image")


def copy_unsaved(export, folder, names=UNSAVED_FILES):
    """Copy the files that a stock class does not save."""
    for name in names:
        (shutil.copytree if (export / name).is_dir() else shutil.copy)(export / name, folder / name)


def save_again(export, folder, change=lambda model: None, dtype=torch.float32, **options):
    """Save again as a stock class does after fine-tuning."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=dtype)
    change(model)
    model.save_pretrained(folder, **options)


def prepare_for_training(model):
    """Change the settings that stock trainers change."""
    model.config.use_cache = False
    model.config.pad_token_id = model.config.eos_token_id
    model.config.attention_dropout = 0.1


def test_a_folder_saved_again_by_a_stock_class_is_imported(family, tmp_path):
    folder = tmp_path / "saved"
    save_again(family.export, folder, prepare_for_training, max_shard_size="20KB")
    transformers.AutoTokenizer.from_pretrained(family.export).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    assert "torch_dtype" not in json.loads((folder / "config.json").read_text())
    missing = r"lacks cm3leon.json, text.model, vocab.json, image/config.json, image/model.safetensors\. .*copy these"
    with pytest.raises(ValueError, match=missing):
        import_export(folder, tmp_path / "back")
    copy_unsaved(family.export, folder)
    reader = CheckpointReader(import_export(folder, tmp_path / "back")[0])
    assert reader.names == family.reader.names and reader.state == family.reader.state
    for name in reader.names:
        assert torch.equal(reader.read(name), family.reader.read(name)), name


@pytest.mark.parametrize("family", ["opt-relu", "qwen3"], indirect=True)
def test_configs_of_several_versions_of_transformers_are_read(family, tmp_path):
    export = shutil.copytree(family.export, tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    for number, (removed, added) in enumerate((
        (["torch_dtype"], {"dtype": "float32"}),
        (["torch_dtype", "use_cache"], {"transformers_version": "4.30.0", "_name_or_path": "x", "dropout": 0.1}),
        ([], {"torch_dtype": "bfloat16", "_attn_implementation_autoset": True, "return_dict": True}),
    )):  # fmt: skip
        kept = {name: value for name, value in config.items() if name not in removed}
        (export / "config.json").write_text(json.dumps(kept | added))
        import_export(export, tmp_path / f"back {number}")
    if family.stock == "Qwen3ForCausalLM":
        (export / "config.json").write_text(json.dumps(config | {"rope_theta": 9000.0}))
        with pytest.raises(ValueError, match=r"config.json has rope_parameters .*9000.* requires .*500"):
            import_export(export, tmp_path / "other")


@pytest.mark.parametrize("family", ["opt-relu"], indirect=True)
def test_changes_by_a_stock_class_are_refused(family, tmp_path):
    def check_refused(message, **options):
        save_again(family.export, tmp_path / "saved", **options)
        copy_unsaved(family.export, tmp_path / "saved")
        with pytest.raises(ValueError, match=message):
            import_export(tmp_path / "saved", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        shutil.rmtree(tmp_path / "saved")

    check_refused(r"weight of .* has type F64; one of F32, BF16, F16 is required", dtype=torch.float64)
    vocabulary = family.reader.vocabulary.size
    enlarge = lambda model: model.resize_token_embeddings(vocabulary + 8)  # noqa: E731
    check_refused(rf"config.json has vocab_size {vocabulary + 8}, the .* requires {vocabulary}; one", change=enlarge)
    save_again(family.export, tmp_path / "saved", prepare_for_training)
    copy_unsaved(family.export, tmp_path / "saved", UNSAVED_FILES[:3])
    with pytest.raises(ValueError, match=r"lacks image/config.json, image/model.safetensors\. "):
        import_export(tmp_path / "saved", tmp_path / "back")
    copy_unsaved(family.export, tmp_path / "saved", UNSAVED_FILES[3:])
    (tmp_path / "saved/model.safetensors").rename(tmp_path / "saved/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*.safetensors but pytorch_model.bin, .* safe_serialization=True"):
        import_export(tmp_path / "saved", tmp_path / "back")


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


def insert_nan(weights):
    weights[sorted(weights)[3]][..., 0] = torch.nan


def double_rows(weights):
    name = sorted(weights)[0]
    weights[name] = torch.cat([weights[name], weights[name]])


@pytest.mark.parametrize("family", ["opt-relu", "qwen3"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(sorted(weights)[1]), "configuration: 1 missing"),
        (lambda weights: weights.update(extra=torch.ones(3)), r"configuration: 1 unknown \(extra\)"),
        (rename_first, "1 missing .* and 1 unknown"),
        (insert_nan, "has NaN or infinite values"),
        (double_rows, r"has shape .* is required"),
    ],
)
def test_unsuitable_weights_are_refused(tmp_path, export, change, message):
    change_weights(export, change)
    with pytest.raises(ValueError, match=message):
        import_export(export, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


@pytest.mark.parametrize("family", ["opt-relu"], indirect=True)
def test_a_folder_that_is_not_an_export_is_refused(tmp_path, export):
    def check_refused(message):
        with pytest.raises(ValueError, match=message):
            import_export(export, tmp_path / "back")
        assert not (tmp_path / "back").exists()

    with pytest.raises(ValueError, match=r"is not an export: it lacks cm3leon.json"):
        import_export(tmp_path, tmp_path / "back")
    metadata = json.loads((export / "cm3leon.json").read_text())
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"ffn_dim": 64}))
    for change, message in (
        ({"model_type": "bert2"}, "config.json has model_type 'bert2'"),
        ({"model_type": "llama"}, "config.json has model_type 'llama', .* requires 'opt'"),
        ({"hidden_size": "wide"}, "config.json is not valid for transformers .*hidden_size"),
    ):
        (export / "config.json").write_text(json.dumps(config | change))
        check_refused(message)
    (export / "config.json").write_text(json.dumps(config | {"ffn_dim": 64}))
    check_refused(r"config.json has ffn_dim 64, the configuration in cm3leon.json requires 128")
    (export / "config.json").write_text("{")
    check_refused("config.json is not valid JSON")
    (export / "config.json").write_text(json.dumps(config))
    for change, message in (
        ({"format": 1}, "has format 1, not 2"),
        ({"config": {"model": {"width": 3}}}, "does not hold the run's configuration"),
        ({"config": {"model": {"layers": 0}}}, r"model.layers \(0\) must be at least 1"),
        ({"state": {"steps": 3}}, "does not hold the run's configuration and state"),
    ):
        (export / "cm3leon.json").write_text(json.dumps(metadata | change))
        check_refused(message)
    (export / "cm3leon.json").write_text(json.dumps(metadata))
    weights = (export / "model.safetensors").read_bytes()
    (export / "model.safetensors").write_bytes(weights[:-100])
    check_refused("model.safetensors cannot be read")
    (export / "model.safetensors").write_bytes(weights)
    (export / "text.model").write_bytes((export / "text.model").read_bytes() + b"\x00")
    check_refused("text.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


@pytest.mark.parametrize("family", ["opt-relu"], indirect=True)
def test_a_run_folder_is_never_replaced(tmp_path, family):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="run exists and is not an export"):
        import_export(family.export, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == "{}\n"
