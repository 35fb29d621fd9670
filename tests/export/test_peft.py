"""Merged weights, the model with its adapters, and stock peft on the export of the base give the same logits."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.export import export_checkpoint
from megatron_cm3leon.export.peft import export_adapter
from megatron_cm3leon.model.reference import reference_logits
from megatron_cm3leon.training.merge import merge_adapter, open_adapter, open_merged
from tests.checkpoint.builders import family_config, write_random_adapter
from tests.export.conftest import FAMILIES
from tests.export.trained import open_trained_model

LORA = {
    "opt-gelu": ["lora.rank=4", "lora.alpha=8"],
    "qwen3": ["lora.rank=4", "lora.layers=[layers.0.attention,layers.1]"],
}


@pytest.fixture(scope="module", params=LORA)
def adapter(request, build_family, vocabulary, tmp_path_factory):
    """(family, checkpoint of adapters of its model)."""
    family = build_family(request.param)
    options = [*FAMILIES[request.param][1], *LORA[request.param], f"train.init={family.checkpoint}"]
    run = tmp_path_factory.mktemp("adapter") / "run"
    return family, write_random_adapter(run, family_config(*options), vocabulary)


@torch.no_grad()
def test_merged_weights_adapters_and_peft_give_the_same_logits(adapter, vocabulary, tmp_path):
    family, checkpoint = adapter
    ids = torch.randint(vocabulary.size, (2, 20), generator=torch.Generator().manual_seed(1))
    base = reference_logits(family.reader.read, family.config, ids)
    with open_trained_model(checkpoint, family.checkpoint) as compute:
        found = compute(ids, torch.float32)[..., : vocabulary.size]
    scale = found.abs().max()
    assert (found - base).abs().max() > 0.1 * scale  # the adapters matter

    merged = CheckpointReader(merge_adapter(checkpoint, tmp_path / "merged"))
    assert not merged.config.trains_part and merged.state.step == 3
    of_merged = reference_logits(merged.read, merged.config, ids)
    assert (of_merged - found).abs().max() <= 1e-5 * scale

    metadata = export_adapter(open_adapter(checkpoint), tmp_path / "peft", base=family.export)
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    [table] = re.findall(r"^### `cm3leon.json` of an adapter\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(metadata)
    assert metadata["base"] == merged.state.init and metadata["base"]["folder"] == str(family.checkpoint)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family.export), tmp_path / "peft")
    assert (model(ids).logits - found).abs().max() <= 1e-5 * scale


def test_layers_have_short_names_where_all_are_adapted(adapter, tmp_path):
    family, checkpoint = adapter
    export_adapter(open_adapter(checkpoint), tmp_path / "peft", dtype="bf16")
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["r"] == 4 and fields["base_model_name_or_path"] == str(family.checkpoint)
    if family.stock == "OPTForCausalLM":
        assert fields["target_modules"] == ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]
        assert fields["lora_alpha"] == 8
    else:
        assert "model.layers.0.self_attn.k_proj" in fields["target_modules"] and len(fields["target_modules"]) == 11


def test_an_adapter_is_not_exported_or_merged_without_its_base(adapter, build_family, tokenizer, tmp_path):
    family, checkpoint = adapter
    with pytest.raises(ValueError, match=r"has only what was trained on .*first run tools/convert_checkpoint.py merge"):
        export_checkpoint(checkpoint, tokenizer, tmp_path / "export")
    other = build_family("opt-relu" if family.stock == "OPTForCausalLM" else "llama").checkpoint
    with pytest.raises(ValueError, match=r"is not the base of|whose weights this run begins with"):
        open_merged(checkpoint, other)
    with pytest.raises(ValueError, match=r"holds a full model \(lora.rank is 0 and train.only empty\)"):
        merge_adapter(family.checkpoint, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge_adapter(checkpoint, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_other_trained_parts_have_no_place_in_an_adapter(build_family, vocabulary, tmp_path):
    family = build_family("opt-gelu")
    options = [*FAMILIES["opt-gelu"][1], f"train.init={family.export}", "train.only=[embeddings,layers.1]"]
    run = tmp_path / "run"
    checkpoint = write_random_adapter(run, family_config(*options, "lora.rank=2"), vocabulary)
    with pytest.raises(ValueError, match=r"were trained \(train.only: embeddings, layers.1\).*run merge"):
        export_adapter(open_adapter(checkpoint), tmp_path / "peft")
    merged = CheckpointReader(merge_adapter(run, tmp_path / "merged"))  # its base is an export
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    a, b = (open_adapter(run).read(name.replace(".weight", f".lora_{letter}.weight")) for letter in "AB")
    assert torch.equal(merged.read(name), family.reader.read(name) + b @ a)
    name = "embedding.word_embeddings.weight"
    assert torch.equal(merged.read(name), open_adapter(run).read(name))
    checkpoint = write_random_adapter(tmp_path / "parts", family_config(*options), vocabulary)
    with pytest.raises(ValueError, match=r"has no adapters \(lora.rank is 0\)"):
        export_adapter(open_adapter(checkpoint), tmp_path / "peft")
