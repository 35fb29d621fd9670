"""tools/convert_checkpoint.py from the command line: export and import, exit statuses, error messages."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.data.stream.stream import build_stream
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.model.reference import reference_logits
from megatron_cm3leon.monitoring.history import read_metrics
from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.checkpoint.builders import (
    CAPTIONS,
    family_config,
    write_random_adapter,
    write_random_checkpoint,
    write_tokenizers,
)
from tests.data.corpora import make_pairs, write_shards
from tests.distributed.launch import ROOT
from tests.export.trained import open_trained_model
from tests.tools.call import call_tool

call = partial(call_tool, "convert_checkpoint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """run/checkpoints/step-00000003, tok/, shards/ and corpus.txt."""
    path = tmp_path_factory.mktemp("conversion")
    vocabulary = write_tokenizers(path / "tok")
    write_shards(path / "shards", make_pairs(40, vocabulary), vocabulary)
    settings = ["train.global_batch_size=4", "train.precision=fp32", "train.steps=5", "schedule.warmup_steps=2"]
    settings += ["data.packing=stream", "data.workers=0", "train.threads=1", "data.image_first_probability=0"]
    config = family_config(f"data.shards={path / 'shards'}", *settings)
    write_random_checkpoint(path / "run", config, vocabulary, stream=build_stream(config))
    (path / "corpus.txt").write_text("".join(CAPTIONS))
    return path


@pytest.fixture(scope="module")
def exported(folder):
    done = call(
        "export", "--checkpoint", folder / "run", "--tokenizer", folder / "tok",
        "--output", folder / "exported", "--check-corpus", folder / "corpus.txt", "--shard-size", "30kB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_adapters_are_merged_and_written_for_peft(folder, tmp_path):
    config = family_config(f"train.init={folder / 'run'}", "lora.rank=2", "lora.layers=[attention]")
    write_random_adapter(tmp_path / "run", config, Tokenizers.load(folder / "tok").vocabulary, step=5)
    done = call("merge", "--checkpoint", tmp_path / "run", "--output", tmp_path / "merged")
    assert done.returncode == 0 and f"wrote {tmp_path}/merged/checkpoints/step-00000005; export it" in done.stdout
    assert sorted(CheckpointReader(tmp_path / "merged/checkpoints/step-00000005").names) == sorted(
        CheckpointReader(folder / "run/checkpoints/step-00000003").names
    )
    done = call("peft", "--checkpoint", tmp_path / "run", "--output", tmp_path / "peft")
    numbers = 2 * 2 * (32 + 96 + 2 * 32 + 32 + 32)  # layers, rank, A of q, k and v and their Bs, A and B of out_proj
    assert f"adapters of OPTForCausalLM, {numbers:,} parameters of" in done.stdout, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path / "peft")) == [
        "adapter_config.json", "adapter_model.safetensors", "cm3leon.json"
    ]  # fmt: skip
    done = call("peft", "--checkpoint", folder / "run", "--output", tmp_path / "other")
    assert done.returncode == 2 and "holds a full model" in done.stderr


def test_export_from_the_command_line(folder, exported):
    found = re.search(r"\|logit difference\| (\S+), (\S+) of the largest \|logit\| \S+ \(at most 1e-05", exported)
    assert 0 < float(found[2]) < 1e-5
    assert f"same ids as text.model on {len(CAPTIONS)} lines" in exported
    assert f"wrote {folder / 'exported'}: " in exported and "step-00000003" in exported
    assert len(list((folder / "exported").glob("model-*-of-*.safetensors"))) > 2
    reader = CheckpointReader(folder / "run/checkpoints/step-00000003")
    ids = torch.randint(reader.vocabulary.size, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(reader.read, reader.config, ids)
    assert (Decoder.load(folder / "exported").all_logits(ids) - expected).abs().max() < 1e-5
    assert Tokenizers.load(folder / "exported").vocabulary == reader.vocabulary


def train(config, output, *overrides):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "megatron_cm3leon.train", config, f"output={output}", *overrides]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [(line["step"], line["batch"], line["loss"], line["grad_norm"]) for line in read_metrics(output)]


@pytest.mark.slow
def test_import_continues_training(folder, exported, tmp_path):
    done = call("import", "--model", folder / "exported", "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'back/checkpoints/step-00000003'}" in done.stdout
    assert "1 random and 1 real sequences" in done.stdout
    config = tmp_path / "back/config.yaml"
    # The exported checkpoint has no optimizer moments either.
    expected = train(config, folder / "run")
    assert [step for step, *_ in expected] == [4, 5] and expected[0][2] != expected[1][2]
    assert train(config, tmp_path / "back") == expected


def test_the_reference_equals_the_model_that_is_trained(folder, tmp_path):
    """check.py compares with reference.py; this test compares reference.py with megatron-core's modules, per family."""
    vocabulary = Tokenizers.load(folder / "tok").vocabulary
    for number, overrides in enumerate(([], ["model.family=llama", "model.qk_norm=true", "model.kv_heads=2"])):
        config = family_config(*overrides)
        folder = write_random_checkpoint(tmp_path / str(number), config, vocabulary)
        ids = torch.randint(vocabulary.size, (2, 20), generator=torch.Generator().manual_seed(1))
        reader = CheckpointReader(folder)
        with open_trained_model(folder) as trained:
            for dtype, limit in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
                expected = trained(ids, dtype)[..., : vocabulary.size]
                found = reference_logits(lambda name, dtype=dtype: reader.read(name).to(dtype), config, ids)  # noqa: B023
                assert (found - expected).abs().max() < limit * expected.abs().max(), (overrides, dtype)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "--checkpoint", ".", "--tokenizer", "tok"], "not a complete checkpoint"),
        (["export", "--checkpoint", "CHECKPOINT", "--tokenizer", "."], "no vocabulary at"),
        (["export", "--checkpoint", "CHECKPOINT", "--tokenizer", "tok", "--check-shards", "."], "manifest"),
        (
            ["export", "--checkpoint", "CHECKPOINT", "--tokenizer", "tok", "--check-corpus", "absent"],
            "absent does not exist",
        ),
        (["import", "--model", "run"], "run is not an export: it lacks cm3leon.json"),
    ],
)
def test_errors_are_readable_and_leave_no_files(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    done = call(*[a.replace("CHECKPOINT", "run/checkpoints/step-00000003") for a in arguments], "--output", "new")
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr
    assert sorted(folder.iterdir()) == before


def test_an_image_tokenizer_of_another_project_is_imported(tmp_path):
    torch.manual_seed(0)
    config = VQGANConfig(image_size=16, codebook_size=8, embed_dim=4, latent_channels=8, base_channels=32,
                         channel_multiplier=(1, 1), num_res_blocks=1)  # fmt: skip
    state = VQGAN(config).state_dict()
    torch.save({"state_dict": state | {"loss.disc.weight": torch.ones(1)}}, tmp_path / "vqgan.ckpt")
    (tmp_path / "tok").mkdir()
    train_text(CAPTIONS, 330).save(tmp_path / "tok/text.model")
    options = ["image", "--weights", tmp_path / "vqgan.ckpt", "--output", tmp_path / "tok", "--specials", 20]
    done = call(*options, "--image-size", 15, "--sentinels", 4)
    assert done.returncode == 2 and "image_size (15) must be a multiple of the down-sampling factor" in done.stderr
    done = call(*options, "--image-size", 16, "--sentinels", 40)
    assert done.returncode == 2 and "vocabulary.specials (20) must hold" in done.stderr
    assert [path.name for path in (tmp_path / "tok").iterdir()] == ["text.model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tok", "vqgan.ckpt"]
    done = call(*options, "--image-size", 16, "--sentinels", 4)
    assert done.returncode == 0, done.stderr
    assert "taming layout, 8 x 8 tokens per image of 16 pixels, 8 codes; weights skipped" in done.stdout
    assert "because only training uses them: 1\n" in done.stdout
    assert "vocab.json: 358 ids" in done.stdout
    loaded = Tokenizers.load(tmp_path / "tok")
    assert loaded.image.config == config and loaded.vocabulary.image_tokens == 64
    done = call(*options, "--image-size", 16, "--sentinels", 4)
    assert done.returncode == 2 and "already has an image tokenizer" in done.stderr


def test_help_and_usage_errors():
    assert call("export").returncode == 2
    help_text = call("export", "--help").stdout
    assert "(default: fp32)" in help_text and "(default: 5GB)" in help_text
    done = call("export", "--checkpoint", "a", "--tokenizer", "b", "--output", "c", "--shard-size", "5 apples")
    assert done.returncode == 2 and "'5 apples' is not a valid size; write 5GB" in done.stderr
