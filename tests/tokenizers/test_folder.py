"""The tokenizer folder: what vocab.json records; files that it does not describe are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cm3leon.tokenizers.folder import Tokenizers, hash_image, write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig


def write_text(folder, size=280) -> None:
    train_text(["a red circle on a white background", "a blue square on a grey one"] * 3, size).save(
        folder / "text.model"
    )


def write_image(folder, seed=0) -> None:
    torch.manual_seed(seed)
    config = VQGANConfig(
        image_size=16,
        codebook_size=32,
        embed_dim=4,
        latent_channels=16,
        base_channels=16,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=0,
        norm="pixel",
    )
    ImageTokenizer(VQGAN(config)).save(folder / "image", training={"seconds": 1.5})


@pytest.fixture
def folder(tmp_path):
    write_text(tmp_path)
    write_image(tmp_path)
    write_vocabulary(tmp_path, specials=20, sentinels=8)
    return tmp_path


def test_the_vocabulary_joins_text_and_image_ids(folder):
    tokenizers = Tokenizers.load(folder)
    vocabulary = tokenizers.vocabulary
    assert (vocabulary.text_size, vocabulary.image_size, vocabulary.specials) == (280, 32, 20)
    assert (vocabulary.image_height, vocabulary.image_width) == tokenizers.image.grid == (4, 4)
    assert vocabulary.size == 332 and vocabulary.sentinels == 8
    assert tokenizers.text.decode(tokenizers.text.encode("a red square")) == "a red square"


def test_the_vocabulary_is_written_only_when_both_tokenizers_exist(tmp_path):
    write_text(tmp_path)
    assert write_vocabulary(tmp_path) is None
    assert not (tmp_path / "vocab.json").exists()
    write_image(tmp_path)
    assert write_vocabulary(tmp_path).specials == 1024
    assert (tmp_path / "vocab.json").is_file()


def test_the_hash_depends_on_weights_config_and_text_but_not_on_the_training_summary(folder):
    def rewrite() -> str:
        return write_vocabulary(folder, specials=20, sentinels=8).hash

    first = rewrite()
    path = folder / "image" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "training": {"seconds": 99}}))
    assert rewrite() == first
    path.write_text(json.dumps({**config, "mid_attention": True}))
    assert rewrite() == first  # the default
    image_hash = hash_image(folder)
    path.write_text(json.dumps({**config, "mid_attention": False}))
    assert hash_image(folder) != image_hash
    path.write_text(json.dumps(config))
    weights = load_file(folder / "image" / "model.safetensors")
    weights["decoder.conv_out.bias"][0] += 1e-6
    save_file(weights, folder / "image" / "model.safetensors")
    second = rewrite()
    write_text(folder, 281)
    assert len({first, second, rewrite()}) == 3


def test_equal_weights_have_equal_hashes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name, seed=3)
    assert hash_image(tmp_path / "a") == hash_image(tmp_path / "b")


def test_replaced_tokenizers_are_refused(folder):
    write_image(folder, seed=1)
    with pytest.raises(
        ValueError, match=r"image \(config.json, model.safetensors\) is not the one that .*vocab\.json was written for"
    ):
        Tokenizers.load(folder)
    write_image(folder, seed=0)
    Tokenizers.load(folder)
    write_text(folder, 279)
    with pytest.raises(ValueError, match=r"text\.model is not the one"):
        Tokenizers.load(folder)


@pytest.mark.parametrize("name", ["text.model", "image/config.json", "image/model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"has no {name}; tools/train_tokenizer.py writes it"):
        Tokenizers.load(folder)


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no vocabulary at .*train_tokenizer"):
        Tokenizers.load(tmp_path)


def test_too_few_special_tokens_are_refused(folder):
    with pytest.raises(ValueError, match=r"specials \(10\) must hold 4 named tokens and 8 sentinels"):
        write_vocabulary(folder, specials=10, sentinels=8)
    assert Vocabulary.load(folder).specials == 20
