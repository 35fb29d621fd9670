"""Image tokenizer: images to codes and codes to images, and its folder on disk.

A folder holds config.json (the fields of VQGANConfig, and under "training" how it was trained) and
model.safetensors (the weights, fp32). Codes are computed in true fp32 everywhere.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_cm3leon.common.threads import one_thread_if_small
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig

FORMAT = 1


@contextmanager
def true_fp32() -> Iterator[None]:
    """No gradients, no autocast, no TF32 or bf16 inside fp32 products: rounding can change which code is nearest.

    cuDNN stays on, restricted to deterministic kernels. Every setting is restored afterwards, whichever of torch's two
    interfaces (allow_tf32, or fp32_precision from torch 2.9 on) the caller has used.
    """
    settings = [*_find_fp32_settings(), (torch.backends.cudnn, "deterministic", True)]
    settings += [(torch.backends.cudnn, "benchmark", False)]
    before = [getattr(module, name) for module, name, _ in settings]
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        try:
            for module, name, value in settings:
                setattr(module, name, value)
            yield
        finally:
            for (module, name, _), value in zip(settings, before, strict=True):
                _restore(module, name, value)


class _MatmulPrecision:
    """torch.get_float32_matmul_precision and its setter as one attribute."""

    value = property(
        lambda self: torch.get_float32_matmul_precision(),
        lambda self, precision: torch.set_float32_matmul_precision(precision),
    )


def _find_fp32_settings() -> Iterator[tuple[object, str, object]]:
    """(object, attribute, value) of each setting that affects fp32 products and convolutions."""
    backends: Any = torch.backends  # its annotations lack the attributes of newer versions
    for module, name, value in ((_MatmulPrecision(), "value", "highest"), (backends.cudnn, "allow_tf32", False)):
        try:
            getattr(module, name)
        except RuntimeError:  # torch refuses to read it once the caller set fp32_precision, which follows below
            continue
        yield module, name, value
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        # For each operator: allow_tf32=False leaves them at "none", which inherits torch.backends.fp32_precision.
        operators = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        for module in [*operators, backends.mkldnn.matmul, backends.mkldnn.conv]:
            yield module, "fp32_precision", "ieee"


def _restore(module: object, name: str, value: object) -> None:
    """Set an attribute to its former value; an fp32_precision that was inherited is inherited again."""
    if name == "fp32_precision":
        setattr(module, name, "none")
        if getattr(module, name) == value:
            return
    setattr(module, name, value)


class ImageTokenizer:
    """Images to codes and back; `load` reads what `save` writes."""

    def __init__(self, model: VQGAN) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.codebook_size = model.config.codebook_size
        self.image_size = model.config.image_size
        side = self.image_size // model.config.downsample
        self.grid = (side, side)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.codebook.device

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to int64 codes [B, h * w], row by row."""
        expected = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"pixels of shape {list(pixels.shape)} must be [batch, {', '.join(map(str, expected))}].")
        with true_fp32(), one_thread_if_small(self.model):
            pixels = pixels.to(self.device, torch.float32)
            return self.model.find_codes(self.model.encode(pixels)).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h * w] to pixels float32 [B, 3, H, W] in [-1, 1]."""
        height, width = self.grid
        if codes.ndim != 2 or codes.shape[1] != height * width:
            raise ValueError(f"codes of shape {list(codes.shape)} must be [batch, {height * width}].")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"image codes {int(codes.min())} to {int(codes.max())} must lie in 0..{self.codebook_size - 1}."
            )
        with true_fp32(), one_thread_if_small(self.model):
            latents = self.model.look_up(codes.to(self.device).view(-1, height, width))
            return self.model.decode(latents).clamp(-1, 1)

    def save(self, folder: str | Path, training: dict | None = None) -> None:
        """Write config.json and model.safetensors; `training` describes how it was trained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"format": FORMAT, "type": "vqgan", **self.config.to_dict(), "training": training or {}}
        weights = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "ImageTokenizer":
        """Read a folder with config.json and model.safetensors, the names and shapes checked strictly."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"no image tokenizer at {folder}: {name} is missing; tools/train_tokenizer.py image writes it."
                )
        values = json.loads((folder / "config.json").read_text())
        if (values.get("format"), values.get("type")) != (FORMAT, "vqgan"):
            raise ValueError(
                f"{folder / 'config.json'} does not have format {FORMAT} and type vqgan; another version wrote it."
            )
        with torch.random.fork_rng(
            devices=[]
        ):  # initial weights, overwritten below, must not advance the caller's generator
            model = VQGAN(VQGANConfig.from_dict(values))
        try:
            weights = load_file(folder / "model.safetensors", device=device)
            check_weights(model, weights)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{folder / 'model.safetensors'} cannot be used: {error}") from error
        model.load_state_dict(weights, assign=True)
        return cls(model.float())


def check_weights(model: nn.Module, weights: dict[str, Tensor], what: str = "config.json") -> None:
    """Raise ValueError if names or shapes of `weights` are not the model's; `what` describes the model."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'no such weight')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} weights do not fit {what}: {'; '.join(wrong[:5])}.")
