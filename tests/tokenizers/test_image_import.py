"""Image tokenizers of other projects: tokens and pixels of stock classes, strict weight names, no pickle is run."""

import os
import re
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.image_import import (
    import_image_tokenizer,
    read_config,
    read_weights,
    write_image_tokenizer,
)
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig

SIZE = 32
SHAPE = dict(
    embed_dim=8, num_embeddings=64, latent_channels=16, base_channels=32, channel_multiplier=[1, 2, 2], num_res_blocks=1
)


def randomize(model):
    """Add noise to every weight, also to norms and biases."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def janus():
    """LlamaGen's tokenizer in transformers: attention at the lowest resolution, code vectors of any length."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return randomize(transformers.JanusVQVAE(transformers.JanusVQVAEConfig(**SHAPE, num_patches=SIZE // 4)))


@pytest.fixture(scope="module")
def pixels():
    torch.manual_seed(1)
    return torch.rand(3, 3, SIZE, SIZE) * 2 - 1


def rename_to_llamagen(state):
    """Rename weights as in LlamaGen's VQModel, which numbers the decoder's levels as transformers does."""
    middle = {"block_1": "0", "attn_1": "1", "block_2": "2"}
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(encoder|decoder)\.(down|up)\.(\d+)\.", r"\1.conv_blocks.\3.", name)
        name = re.sub(r"\.block\.", ".res.", name)
        name = re.sub(r"\.mid\.(\w+)\.", lambda found: f".mid.{middle[found[1]]}.", name)
        renamed[name] = value
    return renamed


def test_llamagen_gives_the_tokens_and_pixels_of_janus(tmp_path, janus, pixels):
    state = rename_to_llamagen(janus.state_dict()) | {"quantize.codebook_used": torch.zeros(65536)}
    assert "decoder.conv_blocks.0.attn.1.q.weight" in state and "encoder.mid.2.conv1.weight" in state
    torch.save({"model": state, "optimizer": {}, "steps": 3}, tmp_path / "vq_ds4.pt")
    tokenizer, description = import_image_tokenizer(tmp_path / "vq_ds4.pt", SIZE)
    assert description == {"imported": "vq_ds4.pt", "layout": "LlamaGen", "left_out": 1}

    # The stock class does not normalize when it encodes; LlamaGen normalizes codes and latents in both directions.
    latents = janus.quant_conv(janus.encoder(pixels)).permute(0, 2, 3, 1)
    codebook = functional.normalize(janus.quantize.embedding.weight, dim=-1)
    expected = torch.cdist(functional.normalize(latents.reshape(-1, 8), dim=-1), codebook).argmin(1).view(3, -1)
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes, expected) and len(codes.unique()) > 4
    torch.testing.assert_close(tokenizer.decode(codes), janus.decode(codes).clamp(-1, 1), rtol=1e-5, atol=1e-5)

    normalized = dict(janus.state_dict()) | {"quantize.embedding.weight": codebook}
    stock = type(janus)(janus.config)
    stock.load_state_dict(normalized)
    assert torch.equal(codes, stock.encode(pixels).image_tokens.view(3, -1))


def build_taming_state(chameleon, janus):
    """Weights with taming's names: Chameleon's encoder, and Janus' decoder numbered from the highest resolution."""
    state = dict(chameleon.state_dict())
    for name, value in janus.state_dict().items():
        if name.startswith(("decoder.", "post_quant_conv.")):
            state[re.sub(r"^decoder\.up\.(\d)", lambda found: f"decoder.up.{2 - int(found[1])}", name)] = value
    return state


@pytest.fixture(scope="module")
def chameleon():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.ChameleonVQVAEConfig(**SHAPE, resolution=SIZE, attn_resolutions=[SIZE // 4])
    return randomize(transformers.ChameleonVQVAE(config))


def test_taming_gives_the_tokens_of_chameleon_and_the_pixels_of_janus(tmp_path, chameleon, janus, pixels):
    state = build_taming_state(chameleon, janus)
    loss = {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(1), "loss.discriminator.main.0.bias": torch.ones(2)}
    torch.save({"state_dict": state | loss, "epoch": 3}, tmp_path / "vqgan.ckpt")
    tokenizer, description = import_image_tokenizer(tmp_path / "vqgan.ckpt", SIZE)
    assert description["layout"] == "taming" and description["left_out"] == 2
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes, chameleon.encode(pixels).image_tokens.view(3, -1)) and len(codes.unique()) > 4
    latents = chameleon.quantize.embedding(codes).view(3, 8, 8, 8).permute(0, 3, 1, 2)
    expected = janus.decoder(janus.post_quant_conv(latents)).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes), expected, rtol=1e-5, atol=1e-5)

    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "vqgan.safetensors")
    reloaded, _ = import_image_tokenizer(tmp_path / "vqgan.safetensors", SIZE)
    assert reloaded.config == tokenizer.config and torch.equal(reloaded.encode(pixels), codes)


AVERAGED_CODES = {"quantize.embedding.cluster_size": torch.ones(64), "quantize.embedding.embed_avg": torch.ones(64, 8)}
LIGHTNING_EMA = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3),
                 "model_ema.encoderconv_inweight": torch.ones(2)}  # fmt: skip


def add_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("build_checkpoint", "skipped"),
    [
        (lambda state: {"state_dict": state | AVERAGED_CODES}, 2),
        (lambda state: {"state_dict": state | LIGHTNING_EMA | {"colorize": torch.ones(3)}}, 4),
        (lambda state: {"model_state_dict": add_prefix("module.", state | AVERAGED_CODES | LIGHTNING_EMA)}, 5),
        (lambda state: add_prefix("module._orig_mod.", state) | {"loss.discriminator.a": torch.ones(1)}, 1),
        (lambda state: {"module": add_prefix("module.", state) | add_prefix("model_ema.module.", state)}, None),
    ],
)
def test_averages_and_prefixes_of_trainers_are_skipped(tmp_path, chameleon, janus, pixels, build_checkpoint, skipped):
    state = build_taming_state(chameleon, janus)
    torch.save(build_checkpoint(state), tmp_path / "vqgan.ckpt")
    tokenizer, description = import_image_tokenizer(tmp_path / "vqgan.ckpt", SIZE)
    assert description["left_out"] == (len(state) if skipped is None else skipped)
    assert torch.equal(tokenizer.encode(pixels), chameleon.encode(pixels).image_tokens.view(3, -1))


def test_several_networks_are_refused(tmp_path, chameleon, janus):
    state = build_taming_state(chameleon, janus)
    torch.save(add_prefix("a.", state) | add_prefix("b.", state), tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"two.ckpt holds 2 networks \(a\., b\. \.\.\.\); save the weights of one"):
        import_image_tokenizer(tmp_path / "two.ckpt", SIZE)
    torch.save(add_prefix("a.", state) | {"quant_conv.bias": torch.ones(8)}, tmp_path / "mixed.ckpt")
    with pytest.raises(ValueError, match=r"some weights both with and without 'a\.' before their name"):
        import_image_tokenizer(tmp_path / "mixed.ckpt", SIZE)


def build_gumbel_state(state):
    """Replace the nearest-code quantizer by taming's GumbelQuantize."""
    torch.manual_seed(3)
    state = {name: value for name, value in state.items() if not name.startswith("quantize.")}
    proj = {"quantize.proj.weight": torch.randn(64, 8, 1, 1), "quantize.proj.bias": torch.randn(64)}
    return state | proj | {"quantize.embed.weight": torch.randn(64, 8)}


def test_gumbel_codes_have_the_largest_logit(tmp_path, chameleon, janus, pixels):
    state = build_gumbel_state(build_taming_state(chameleon, janus))
    torch.save({"state_dict": state}, tmp_path / "gumbel.ckpt")
    tokenizer, _ = import_image_tokenizer(tmp_path / "gumbel.ckpt", SIZE)
    latents = chameleon.quant_conv(chameleon.encoder(pixels))
    logits = torch.einsum("bdhw,kd->bkhw", latents, state["quantize.proj.weight"][:, :, 0, 0])
    expected = (logits + state["quantize.proj.bias"].view(1, -1, 1, 1)).argmax(1).flatten(1)
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes, expected) and len(codes.unique()) > 4
    latents = state["quantize.embed.weight"][codes].view(3, 8, 8, 8).permute(0, 3, 1, 2)
    expected = janus.decoder(janus.post_quant_conv(latents)).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes), expected, rtol=1e-5, atol=1e-5)

    write_image_tokenizer(tokenizer, {}, tmp_path / "tok", specials=20, sentinels=4)
    assert torch.equal(ImageTokenizer.load(tmp_path / "tok/image").encode(pixels), codes)


@pytest.mark.parametrize(
    ("multipliers", "attention", "gumbel", "size", "tokens", "codes", "width"),
    [
        ((1, 1, 2, 4), (32,), True, 256, 1024, 8192, 256),  # taming's vqgan_gumbel_f8
        ((1, 1, 2, 2, 4), (16,), False, 256, 256, 16384, 256),  # taming's vqgan_imagenet_f16_16384
        ((1, 1, 2, 2, 4), (), False, 512, 1024, 8192, 256),  # Chameleon's
    ],
)
def test_public_configurations_are_read_from_the_shapes_of_weights(
    tmp_path, multipliers, attention, gumbel, size, tokens, codes, width
):
    config = VQGANConfig(
        image_size=size, codebook_size=codes, embed_dim=width, channel_multiplier=multipliers,
        attn_resolutions=attention, quantizer="logits" if gumbel else "nearest",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = VQGAN(config).state_dict()
    assert read_config(shapes, size) == config
    assert (size // config.downsample) ** 2 == tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.up.1.upsample.conv.bias"), "decoder.up.1.upsample.conv.bias is missing, expected"),
        (lambda s: s.update({"quantize.used": torch.ones(3)}), r"quantize.used is \(3,\), expected no such weight"),
        (lambda s: s.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (lambda s: s.update({"quant_conv.bias": torch.ones(9)}), r"quant_conv.bias is \(9,\), expected \(8,\)"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("decoder.")], r"\d\d weights .* is missing"),
        (lambda s: s["quant_conv.bias"].fill_(torch.nan), "quant_conv.bias of .* holds NaN"),
        (lambda s: [s.pop(name) for name in list(s) if "down" in name], "is not a VQGAN of the taming layout"),
    ],
)
def test_unsuitable_weights_are_refused(tmp_path, chameleon, janus, change, message):
    state = {name: value.clone() for name, value in build_taming_state(chameleon, janus).items()}
    change(state)
    torch.save({"state_dict": state}, tmp_path / "vqgan.ckpt")
    with pytest.raises(ValueError, match=message):
        import_image_tokenizer(tmp_path / "vqgan.ckpt", SIZE)


def test_objects_of_a_trainer_are_skipped(tmp_path):
    """A checkpoint as Lightning wrote it: a class of a package that is not installed is the key of a dict."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks"})
    sys.modules["pytorch_lightning"], sys.modules["pytorch_lightning.callbacks"] = types.ModuleType("x"), module
    try:
        saved = {"state_dict": {"a": torch.arange(3)}, "callbacks": {module.ModelCheckpoint: module.ModelCheckpoint()}}
        torch.save(saved, tmp_path / "new.ckpt")
    finally:
        del sys.modules["pytorch_lightning"], sys.modules["pytorch_lightning.callbacks"]
    assert read_weights(tmp_path / "new.ckpt")["a"].tolist() == [0, 1, 2]
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.ckpt")["a"].tolist() == [1, 1]


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_executed(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Harmful(tmp_path / "made")}, tmp_path / "harmful.ckpt")
    with pytest.raises(ValueError, match=r"it holds posix.mkdir, which is not a weight and is not executed"):
        read_weights(tmp_path / "harmful.ckpt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.ckpt", None, "does not exist"),
        ("text.ckpt", b"hello", "cannot be used: it is damaged"),
        ("text.safetensors", b"hello", "cannot be read"),
    ],
)
def test_files_without_weights_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / name)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no named weights"):
        read_weights(tmp_path / "list.pt")
