"""tools/inspect_shards.py: checksums, statistics, and images decoded from the tokens."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

from megatron_cm3leon.tokenizers.folder import write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.data.corpora import write_images
from tests.tools.call import call_tool

inspect = partial(call_tool, "inspect_shards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of pairs, a text, an interleaved and an instruction document, and their tokenizer."""
    folder = tmp_path_factory.mktemp("inspect")
    pairs = write_images(folder / "raw", 6)
    with pairs.open("a") as file:
        file.write('{"text": "only words"}\n{"image": "none.png", "caption": "lost"}\n')
        segments = [{"text": "before"}, {"image": "1.png"}, {"text": "after"}]
        file.write(json.dumps({"segments": segments}) + "\n")
        segments = [{"role": "prompt", "text": "which?"}, {"role": "target", "text": "this", "joined": True}]
        file.write(json.dumps({"segments": segments}) + "\n")
    (folder / "tok").mkdir()
    train_text([f"picture {number}" for number in range(50)], 280).save(folder / "tok/text.model")
    torch.manual_seed(0)
    config = VQGANConfig(
        image_size=16, codebook_size=32, embed_dim=8, latent_channels=32, base_channels=32,
        channel_multiplier=(1, 1, 1), num_res_blocks=1, mid_attention=False,
    )  # fmt: skip
    ImageTokenizer(VQGAN(config)).save(folder / "tok/image")
    write_vocabulary(folder / "tok", specials=32, sentinels=16)
    arguments = ["--input", pairs, "--tokenizer", folder / "tok", "--output", folder / "shards", "--part-size", 4]
    result = call_tool("preprocess_data", *arguments, "--max-bad-fraction", 0.2, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    return folder


def test_statistics_and_a_contact_sheet_are_written(folder):
    result = inspect("--shards", folder / "shards", "--tokenizer", folder / "tok", "--sheet", folder / "new/sheet.png")
    assert result.returncode == 0, result.stderr
    for line in (
        "all 10 files match the checksums of the manifest.",
        "9 documents, ",
        "kinds: 1 instruction, 1 interleaved, 6 pair, 1 text",
        "112 of 7 images",
        "inputs: 10 read, 9 written, 0 duplicates, 0 filtered, 1 quarantined\n  1 x missing picture",
        "7 images decoded from tokens.",
    ):
        assert line in result.stdout, line
    sheet = Image.open(folder / "new/sheet.png")
    assert sheet.width > 1000 and len(set(sheet.convert("RGB").getdata())) > 20


def test_damaged_shards_and_usage_errors_exit_with_2(folder):
    tar = folder / "shards/shard-000000-000.tar"
    content = tar.read_bytes()
    try:
        tar.write_bytes(content[:100] + b"8" + content[101:])
        result = inspect("--shards", folder / "shards")
        assert result.returncode == 2
        assert "error: 1 files at" in result.stderr and "shard-000000-000.tar: its sha256 differs" in result.stderr
        assert inspect("--shards", folder / "shards", "--no-verify").returncode == 0
    finally:
        tar.write_bytes(content)
    for arguments, message in (
        (["--sheet", "x.png"], "error: --sheet requires --tokenizer"),
        (["--images", 0], "error: --images (0) must be at least 1"),
        (["--pictures", 0], "error: --images (0) must be at least 1"),
    ):
        result = inspect("--shards", folder / "shards", *arguments)
        assert result.returncode == 2 and result.stderr.startswith(message)
