"""Images to codes, codes to images, and the folder on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cm3leon.tokenizers.image import ImageTokenizer, true_fp32
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    config = VQGANConfig(
        image_size=16,
        codebook_size=32,
        embed_dim=4,
        latent_channels=16,
        base_channels=16,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=0,
        mid_attention=False,
        norm="pixel",
        encoder_kernel=1,
    )
    model = VQGAN(config)
    with torch.no_grad():  # codes that are latents of images
        model.quantize.embedding.weight.copy_(model.encode(draw_pixels(2))[0].flatten(1).T.repeat(2, 1))
    return ImageTokenizer(model)


def draw_pixels(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_types_and_ranges(tokenizer):
    assert (tokenizer.image_size, tokenizer.grid, tokenizer.codebook_size) == (16, (4, 4), 32)
    codes = tokenizer.encode(draw_pixels())
    assert codes.shape == (3, 16) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 32 and len(codes.unique()) > 3
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (3, 3, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert not pixels.requires_grad


def test_a_small_tokenizer_uses_one_thread_and_gives_the_same_codes(tokenizer, monkeypatch):
    torch.manual_seed(0)
    pixels = torch.rand(8, 3, tokenizer.image_size, tokenizer.image_size) * 2 - 1
    thread_counts, before = [], torch.get_num_threads()
    hooks = [
        part.register_forward_pre_hook(lambda *_: thread_counts.append(torch.get_num_threads()))
        for part in (tokenizer.model.encoder, tokenizer.model.decoder)
    ]
    torch.set_num_threads(2)
    try:
        codes = tokenizer.encode(pixels)
        decoded = tokenizer.decode(codes)
        assert thread_counts == [1, 1] and torch.get_num_threads() == 2
        monkeypatch.setattr("megatron_cm3leon.common.threads.SMALL_MODEL", 0)
        assert torch.equal(tokenizer.encode(pixels), codes)
        torch.testing.assert_close(tokenizer.decode(codes), decoded, rtol=1e-5, atol=1e-5)
        assert thread_counts == [1, 1, 2, 2]
    finally:
        torch.set_num_threads(before)
        for hook in hooks:
            hook.remove()


def test_codes_are_in_row_order(tokenizer):
    """A changed patch in row 1, column 2 of the grid changes latent 1 * 4 + 2 only."""
    pixels = draw_pixels(1)
    before = tokenizer.model.encode(pixels)
    pixels[:, :, 4:8, 8:12] *= -1
    changed = (before - tokenizer.model.encode(pixels)).abs().amax(dim=1).flatten() > 1e-6
    assert changed.nonzero().flatten().tolist() == [6]


def test_codes_are_computed_in_fp32_under_autocast(tokenizer):
    """Autocast around the call, as in a training loop, does not change the codes."""
    pixels = draw_pixels(16)
    expected = tokenizer.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels), expected)
        assert tokenizer.decode(expected).dtype == torch.float32


def read_precision() -> dict[str, object]:
    """All settings of torch that decide how fp32 is computed; "refused" where torch does not let us read one."""
    backends = torch.backends
    values = {
        "cudnn": backends.cudnn.enabled,
        "deterministic": backends.cudnn.deterministic,
        "benchmark": backends.cudnn.benchmark,
    }
    legacy = {"matmul": torch.get_float32_matmul_precision, "convolution": lambda: backends.cudnn.allow_tf32}
    for name, read in legacy.items():
        try:
            values[name] = read()
        except RuntimeError:
            values[name] = "refused"
    for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv"):
        backend, operator = name.split(".")
        values[name] = getattr(getattr(getattr(backends, backend), operator), "fp32_precision", None)
    return values


SETTINGS = {
    "torch's defaults": lambda: None,
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "fp32_precision of one operator": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "fp32_precision of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def precision():
    """Restores the settings of torch after a test."""
    operators = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv]
    operators += [torch.backends.cudnn.rnn, torch.backends.mkldnn.conv]
    yield
    torch.backends.fp32_precision = "none"
    for operator in operators:
        operator.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("setting", SETTINGS)
def test_true_fp32_keeps_cudnn_on_and_restores_the_settings_of_the_caller(precision, setting):
    if setting.startswith("fp32_precision") and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch is older than 2.9")
    SETTINGS[setting]()
    before = read_precision()
    with true_fp32():
        inside = read_precision()
        assert inside["cudnn"] and inside["deterministic"] and not inside["benchmark"]
        assert inside["matmul"] == "highest" or before["matmul"] == "refused"
        assert {inside[name] for name in inside if "." in name} <= {"ieee", None}, inside
    assert read_precision() == before
    if setting == "fp32_precision of all":
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee", "the setting is not inherited any more"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path, training={"steps": 3})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 1 and config["type"] == "vqgan" and config["training"] == {"steps": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.config == tokenizer.config
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    ImageTokenizer.load(tmp_path)
    assert torch.equal(torch.rand(1), expected), "loading changed the random generator of the caller"
    codes = tokenizer.encode(draw_pixels())
    assert torch.equal(loaded.encode(draw_pixels()), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16, 8), (1, 1, 16, 16), (1, 3, 32, 32)])
def test_pixels_of_a_wrong_shape_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match=r"pixels of shape .* must be \[batch, 3, 16, 16\]"):
        tokenizer.encode(torch.zeros(shape))


def test_codes_of_a_wrong_shape_or_range_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"codes of shape \[1, 9\] must be \[batch, 16\]"):
        tokenizer.decode(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"image codes 0 to 32 must lie in 0\.\.31"):
        tokenizer.decode(torch.tensor([[0] * 15 + [32]]))


def test_folder_errors_are_readable(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no image tokenizer at .*config\.json is missing"):
        ImageTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("quant_conv.bias", "extra"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"extra is \(4,\), expected no such weight.*quant_conv\.bias is missing"):
        ImageTokenizer.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used"):
        ImageTokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 2, "type": "vqgan"}))
    with pytest.raises(ValueError, match="does not have format 1 and type vqgan"):
        ImageTokenizer.load(tmp_path)
