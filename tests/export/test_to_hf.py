"""Export: stock classes give the logits of the trained model; a failed export changes no file."""

import errno
import json
import os
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.export import export_checkpoint, layouts, parts
from megatron_cm3leon.export.reader import read_training_facts
from megatron_cm3leon.model.reference import reference_logits
from megatron_cm3leon.model.weights import canonical_shapes
from tests.checkpoint.builders import family_config, flip_byte, write_random_checkpoint, write_tokenizers


def load_stock(folder):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(loading["missing_keys"]) <= {"lm_head.weight"} and not loading["unexpected_keys"]
    return model.eval()


def random_ids(vocabulary, seed=2):
    return torch.randint(vocabulary.size, (3, 20), generator=torch.Generator().manual_seed(seed))


def test_stock_classes_give_the_trained_logits(family, vocabulary):
    model = load_stock(family.export)
    assert type(model).__name__ == family.stock and model.dtype == torch.float32
    ids = random_ids(vocabulary)
    expected = reference_logits(family.reader.read, family.config, ids)
    found = model(ids).logits.detach()
    assert found.shape == expected.shape == (3, 20, vocabulary.size)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    assert expected.std() > 0.1  # the compared logits differ from each other
    parameters = {id(p): p.numel() for p in model.parameters()}
    unused = 2 * 32 if family.stock.startswith("OPT") else 0
    assert family.metadata["parameters"] == sum(parameters.values()) - unused


def test_the_check_is_printed_and_recorded(family):
    metadata = family.metadata
    assert metadata["max_abs_logit_diff"] == pytest.approx(0, abs=1e-4) and metadata["max_abs_logit_diff"] > 0
    assert metadata["max_relative_logit_diff"] <= 1e-5
    assert "1 random and 1 real sequences of 20 tokens, fp32" in metadata["check"]
    assert json.loads((family.export / "cm3leon.json").read_text()) == metadata
    assert metadata["training"]["seq_length"] == 20
    assert read_training_facts(family.export) == metadata["training"]


def test_earlier_exports_say_in_their_configuration_how_much_was_infilled(tmp_path):
    cases = [
        ({"training": {"cm3_probability": 0.5}}, 0.0),
        ({"training": {}, "config": {"cm3": {"probability": 0.5}}}, 0.0),
        ({"training": {}, "config": {"cm3": {"infill_probability": 0.4}}}, 0.4),
        ({"training": {"cm3_infill_probability": 0.2}, "config": {"cm3": {"infill_probability": 0.4}}}, 0.2),
    ]
    for metadata, share in cases:
        (tmp_path / "cm3leon.json").write_text(json.dumps(metadata))
        assert read_training_facts(tmp_path) == metadata["training"] | {"cm3_infill_probability": share}
    (tmp_path / "cm3leon.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be read"):
        read_training_facts(tmp_path)


def test_the_folder_is_complete(family, vocabulary):
    names = sorted(str(path.relative_to(family.export)) for path in family.export.rglob("*.*"))
    assert names == [
        "README.md",
        "cm3leon.json",
        "config.json",
        "generation_config.json",
        "image/config.json",
        "image/model.safetensors",
        "model.safetensors",
        "text.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    config = json.loads((family.export / "config.json").read_text())
    assert config["architectures"] == [family.stock] and config["vocab_size"] == vocabulary.size
    ids = json.loads((family.export / "generation_config.json").read_text())
    assert ids["eos_token_id"] == vocabulary.eos and ids["pad_token_id"] == vocabulary.pad
    card = (family.export / "README.md").read_text()
    assert family.stock in card and family.metadata["check"] in card
    configuration = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert configuration["model"]["family"] == family.config.model.family


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_small_shards_and_reduced_precision(tmp_path, tokenizer, vocabulary, dtype):
    checkpoint = write_random_checkpoint(tmp_path / "run", family_config("model.family=llama"), vocabulary)
    metadata = export_checkpoint(checkpoint, tokenizer, tmp_path / "out", dtype=dtype, shard_bytes=20_000)
    assert "1 random sequences" in metadata["check"]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("model-*.safetensors")}
    assert set(index["weight_map"].values()) == set(sizes) and len(sizes) > 3
    shards_of_one_weight = [name for name in sizes if list(index["weight_map"].values()).count(name) == 1]
    assert all(size < 22_000 for name, size in sizes.items() if name not in shards_of_one_weight)
    model = load_stock(tmp_path / "out")
    assert model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())
    reader, ids = CheckpointReader(checkpoint), random_ids(vocabulary)
    rounded = reference_logits(lambda name: reader.read(name).to(model.dtype).float(), reader.config, ids)
    assert (model.float()(ids).logits - rounded).abs().max() < 1e-5 * rounded.abs().max()


def test_qkv_rows_are_grouped_by_key_head():
    rows = torch.arange(16.0)[:, None].expand(16, 3)  # 4 query heads of width 2, 2 key heads: q q k v, q q k v
    query, key, value = parts.split_qkv(rows, heads=4, kv_heads=2)
    assert query[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert key[:, 0].tolist() == [4, 5, 12, 13]
    assert value[:, 0].tolist() == [6, 7, 14, 15]
    assert torch.equal(parts.join_qkv(query, key, value, heads=4, kv_heads=2), rows)


@pytest.fixture
def checkpoint(tmp_path, vocabulary):
    return write_random_checkpoint(tmp_path / "run", family_config(), vocabulary)


def test_a_wrong_order_of_rows_fails_and_nothing_is_written(tmp_path, tokenizer, checkpoint, monkeypatch):
    monkeypatch.setattr(parts, "split_qkv", lambda weight, heads, kv_heads: weight.chunk(3))
    with pytest.raises(ValueError, match=r"logits differ from the trained model's: .*at most 1e-05.*nothing was"):
        export_checkpoint(checkpoint, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_wrong_norm_epsilon_fails(tmp_path, tokenizer, vocabulary, monkeypatch):
    checkpoint = write_random_checkpoint(tmp_path / "run", family_config("model.family=llama"), vocabulary)
    fields = layouts.config_fields

    def change_fields(*arguments):
        return fields(*arguments) | {"rms_norm_eps": 1e-4}

    monkeypatch.setattr("megatron_cm3leon.export.to_hf.config_fields", change_fields)
    monkeypatch.setattr("megatron_cm3leon.export.folder.config_fields", change_fields)
    with pytest.raises(ValueError, match="logits differ"):
        export_checkpoint(checkpoint, tokenizer, tmp_path / "out")


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, weight: None if name == FC1 else weight, rf"1 missing \({FC1}\)"),
        (lambda name, weight: weight.fill_(torch.nan) if name == FC1 else weight, rf"{FC1} of .* has NaN"),
        (lambda name, weight: weight[1:] if name == FC1 else weight, r"has shape \(127, 32\), this model has \(128"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, tokenizer, vocabulary, change, message):
    checkpoint = write_random_checkpoint(tmp_path / "run", family_config(), vocabulary, change=change)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(checkpoint, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_flipped_bit_is_refused(tmp_path, tokenizer, checkpoint):
    flip_byte(checkpoint / "rank-00001.safetensors")
    with pytest.raises(ValueError, match=r"rank-00001.safetensors does not match its SHA-256"):
        export_checkpoint(checkpoint, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_fp16_are_refused(tmp_path, tokenizer, vocabulary):
    config = family_config()
    checkpoint = write_random_checkpoint(tmp_path / "run", config, vocabulary, change=lambda name, weight: weight * 1e5)
    with pytest.raises(ValueError, match=r"infinite values as float16; .*or with --dtype fp32"):
        export_checkpoint(checkpoint, tokenizer, tmp_path / "out", dtype="fp16")


def test_other_tokenizers_are_refused(tmp_path, tokenizer, checkpoint):
    write_tokenizers(tmp_path / "other", text_size=331)
    with pytest.raises(ValueError, match=r"another vocabulary .*text_size: 331 instead of 330"):
        export_checkpoint(checkpoint, tmp_path / "other", tmp_path / "out")
    shutil.copytree(tokenizer, tmp_path / "swapped")
    shutil.copy(tmp_path / "other/text.model", tmp_path / "swapped")
    with pytest.raises(ValueError, match=r"is not the one that .*vocab.json was written for"):
        export_checkpoint(checkpoint, tmp_path / "swapped", tmp_path / "out")
    (tmp_path / "swapped/text.model").unlink()
    with pytest.raises(ValueError, match="has no text"):
        export_checkpoint(checkpoint, tmp_path / "swapped", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept_or_replaced_only_by_a_complete_export(tmp_path, tokenizer, checkpoint):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"mine exists and is not an export"):
            export_checkpoint(checkpoint, tokenizer, tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"

    (tmp_path / "out").mkdir()  # an empty folder is used
    export_checkpoint(checkpoint, tokenizer, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"out already holds an export; .*--overwrite"):
        export_checkpoint(checkpoint, tokenizer, tmp_path / "out", dtype="bf16")
    damaged = shutil.copytree(checkpoint, tmp_path / "spoiled")
    flip_byte(damaged / "rank-00000.safetensors")
    with pytest.raises(ValueError, match="SHA-256"):
        export_checkpoint(damaged, tokenizer, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    export_checkpoint(checkpoint, tokenizer, tmp_path / "out", dtype="bf16", overwrite=True)
    assert (tmp_path / "out/model.safetensors").stat().st_size < 0.6 * len(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "run", "spoiled"]


def test_a_full_disk_does_not_change_an_existing_export(tmp_path, tokenizer, checkpoint, monkeypatch):
    export_checkpoint(checkpoint, tokenizer, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(checkpoint, tokenizer, tmp_path / "out", dtype="bf16", overwrite=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_every_weight_is_exported_once(vocabulary):
    for overrides in ([], ["model.family=llama", "model.qk_norm=true"]):
        config = family_config(*overrides)
        listed = parts.list_parts(config, vocabulary.size)
        assert {part.name: part.shape for part in listed} == canonical_shapes(config, vocabulary.size)
        assert listed[0].name == "embedding.word_embeddings.weight"
        targets = {name: shape for part in listed for name, shape in part.targets.items()}
        assert targets == layouts.stock_weights(layouts.shape_of(config, vocabulary.size))
