"""The network: weight names and codes of the public models; invalid configurations."""

import pytest
import torch

from megatron_cm3leon.tokenizers.vqgan import VQGAN, PixelNorm, VQGANConfig

TINY = dict(image_size=32, codebook_size=64, embed_dim=8, latent_channels=16, base_channels=32, num_res_blocks=1)


def build_model(**changes) -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**{**TINY, **changes})).eval().requires_grad_(False)
    for weight in model.parameters():  # norms and biases too, so that the result depends on each
        weight.add_(0.1 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        dict(channel_multiplier=(1, 2, 2)),
        dict(channel_multiplier=(1, 1, 2, 4), attn_resolutions=(8, 4), num_res_blocks=2),
        dict(channel_multiplier=(1, 2), mid_attention=False),
        dict(channel_multiplier=(1, 1, 1), num_res_blocks=0),
    ],
)
def test_the_encoder_equals_chameleon_vqvae_of_transformers(changes):
    transformers = pytest.importorskip("transformers")
    model = build_model(**changes)
    config = model.config
    oracle = transformers.ChameleonVQVAE(
        transformers.ChameleonVQVAEConfig(
            embed_dim=config.embed_dim,
            num_embeddings=config.codebook_size,
            latent_channels=config.latent_channels,
            resolution=config.image_size,
            base_channels=config.base_channels,
            channel_multiplier=list(config.channel_multiplier),
            num_res_blocks=config.num_res_blocks,
            attn_resolutions=list(config.attn_resolutions) or None,
            attn_type="vanilla" if config.mid_attention else "none",
        )
    ).eval()
    ours = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    assert set(ours) == set(oracle.state_dict())
    oracle.load_state_dict(ours)
    pixels = torch.rand(3, 3, config.image_size, config.image_size) * 2 - 1
    latents = model.encode(pixels)
    expected = oracle.encode(pixels)
    torch.testing.assert_close(latents, oracle.quant_conv(expected.last_hidden_state), rtol=1e-5, atol=1e-5)
    codes = model.find_codes(latents)
    assert torch.equal(codes.flatten(), expected.image_tokens.flatten())
    assert len(codes.unique()) > 4
    assert torch.equal(
        model.look_up(codes), model.quantize.embedding(expected.image_tokens.view_as(codes)).permute(0, 3, 1, 2)
    )


def test_the_decoder_has_the_taming_layout():
    names = set(build_model(channel_multiplier=(1, 2, 2), attn_resolutions=(16,)).state_dict())
    for name in (
        "decoder.conv_in.weight",
        "decoder.mid.block_1.norm1.weight",
        "decoder.mid.attn_1.proj_out.bias",
        "decoder.mid.block_2.conv2.weight",
        "decoder.up.0.block.0.nin_shortcut.weight",  # 64 -> 32 channels at full resolution
        "decoder.up.0.block.1.conv1.weight",
        "decoder.up.1.attn.1.q.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.2.upsample.conv.weight",
        "decoder.norm_out.weight",
        "decoder.conv_out.weight",
        "post_quant_conv.weight",
        "quantize.embedding.weight",
    ):
        assert name in names, name
    assert not any(name.startswith("decoder.up.0.upsample") for name in names)


def test_number_of_parameters_of_the_public_size():
    """Encoder 26M, decoder 38M for 256 pixels at f = 8."""
    with torch.device("meta"):
        model = VQGAN(VQGANConfig(attn_resolutions=(32,)))
    count = lambda part: sum(weight.numel() for weight in part.parameters())  # noqa: E731
    assert round(count(model.encoder) / 1e6) == 26 and round(count(model.decoder) / 1e6) == 38


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_any_downsampling_factor_can_be_built(levels):
    model = build_model(channel_multiplier=(1,) * levels)
    pixels = torch.zeros(2, 3, 32, 32)
    latents = model.encode(pixels)
    side = 32 // 2 ** (levels - 1)
    assert latents.shape == (2, 8, side, side)
    assert model.decode(latents).shape == pixels.shape


@pytest.mark.parametrize("changes, changed_side", [(dict(norm="pixel", encoder_kernel=1), 1), (dict(), 8)])
def test_a_latent_depends_only_on_its_patch_with_pixel_norm_and_kernel_1(changes, changed_side):
    model = build_model(channel_multiplier=(1, 1, 1), mid_attention=False, **changes)
    pixels = torch.rand(1, 3, 32, 32)
    other_pixels = pixels.clone()
    other_pixels[:, :, 8:12, 8:12] = 1
    differs = (model.encode(pixels) - model.encode(other_pixels)).abs().amax(dim=1)[0] > 1e-6
    assert differs[2, 2]
    assert differs.sum() == changed_side * changed_side  # GroupNorm averages over the image: every latent changes


def test_pixel_norm_is_a_layer_norm_over_channels():
    norm = PixelNorm(32, eps=1e-6)
    x = torch.randn(2, 32, 4, 4) * 3 + 1
    out = norm(x)
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones(2, 4, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(base_channels=48), r"base_channels \(48\) must be a multiple of 32 with norm=group"),
        (dict(image_size=30, channel_multiplier=(1, 1, 1)), r"image_size \(30\) must be a multiple .*\(4 ="),
        (dict(attn_resolutions=(5,)), r"attn_resolutions \(\[5\]\) must be among the resolutions \[32, 16, 8, 4\]"),
        (dict(num_res_blocks=0), "must not change if num_res_blocks is 0"),
        (dict(norm="batch"), "norm .'batch'. must be group or pixel"),
        (dict(encoder_kernel=5), r"encoder_kernel \(5\) must be 1 or 3"),
        (dict(codebook_size=0), r"codebook_size \(0\) must be at least 1"),
        (dict(channel_multiplier=()), "channel_multiplier"),
    ],
)
def test_invalid_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**{**TINY, **changes})


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"unknown fields \['l2_norm'\]"):
        VQGANConfig.from_dict({**TINY, "l2_norm": True})
