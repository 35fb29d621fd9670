"""The Inception network of FID: weights of a verified file, and features [n, 2048] of images.

The network is torch-fidelity's (Inception v3 of 2015-12-05, ported from TensorFlow), or NVIDIA's TorchScript file of
the same. Nothing is downloaded. A file whose SHA-256 is not one of the published ones is refused before it is read,
unless its hash is given; its figures are then named after the hash, never FID.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.evaluation.metrics.fidelity import load_fidelity
from megatron_cm3leon.evaluation.metrics.resize import MODES, resize_batch, resize_clean, scale_values

INPUT_SIZE = 299
WIDTH = 2048
PTH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TORCHSCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
KNOWN_WEIGHTS = {
    "pt_inception-2015-12-05-6726825d.pth": PTH_SHA256,
    "weights-inception-2015-12-05-6726825d.pth": PTH_SHA256,
    "inception-2015-12-05.pt": TORCHSCRIPT_SHA256,
}
"""Published files -> SHA-256: of pytorch-fid's release, of torch-fidelity's (the same bytes), of NVIDIA (clean-fid)."""


@dataclass(frozen=True)
class Weights:
    """A file of weights whose hash was verified."""

    path: Path
    sha256: str

    @property
    def published(self) -> bool:
        return self.sha256 in KNOWN_WEIGHTS.values()


def verify_weights(path: str | Path, declared: str | None = None) -> Weights:
    """Hash a file and compare it with the published files, or with the `declared` SHA-256; nothing is loaded.

    Raises ValueError if there is no file, or its hash is another one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"--weights ({path}) is not a file; put one of {', '.join(KNOWN_WEIGHTS)} there. Nothing is downloaded."
        )
    sha256 = sha256_file(path)
    if declared is not None and declared.lower() != sha256:
        raise ValueError(f"--weights-sha256 ({declared}) is not the SHA-256 of {path}, {sha256}; check the file.")
    if declared is None and sha256 not in KNOWN_WEIGHTS.values():
        raise ValueError(
            f"--weights ({path}) has the SHA-256 {sha256}, which is none of the published Inception weights; give one "
            f"of {', '.join(KNOWN_WEIGHTS)}, or --weights-sha256 to measure with these weights under another name."
        )
    return Weights(path, sha256)


class Inception:
    """Features of the last pooling layer of Inception v3."""

    width = WIDTH

    def __init__(self, weights: Weights, resize: str, device: str = "cpu") -> None:
        """Load verified weights. ValueError for another `resize` than MODES, or a file of another network."""
        if resize not in MODES:
            raise ValueError(f"--resize ({resize}) must be one of {', '.join(MODES)}.")
        self.weights, self.resize, self.device = weights, resize, torch.device(device)
        layers = _load_torchscript(weights.path) if _is_torchscript(weights.path) else _load_layers(weights.path)
        self.layers = layers.eval().to(self.device)

    @property
    def name(self) -> str:
        """What the distance is called: fid, or fd-inception-HEX8 with weights that are not the published ones."""
        return "fid" if self.weights.published else f"fd-inception-{self.weights.sha256[:8]}"

    @property
    def identity(self) -> dict[str, str]:
        """What features depend on, beside the images: recorded in files of statistics."""
        return {"network": self.weights.sha256, "resize": self.resize}

    def prepare(self, image_HW3: np.ndarray) -> np.ndarray:
        """The part of the work that is done per image, in threads: uint8 [H, W, 3] to [3, ., .]."""
        if self.resize == "clean":
            return resize_clean(image_HW3, INPUT_SIZE)
        return np.ascontiguousarray(image_HW3.transpose(2, 0, 1))

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features float32 [n, 2048] of prepared images of one size."""
        batch = torch.from_numpy(np.stack(images)).to(self.device).float()
        if self.resize != "clean":
            batch = resize_batch(batch, INPUT_SIZE, self.resize)
        inputs = scale_values(batch, self.resize).contiguous(memory_format=torch.channels_last)
        return self.layers(inputs).flatten(1).float().cpu().numpy()


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _load_torchscript(path: Path) -> nn.Module:
    """The attribute `layers` of NVIDIA's file: the network without the resizing that the file also has."""
    try:
        module = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a TorchScript file that torch {torch.__version__} reads; copy it again."
        ) from error
    if not hasattr(module, "layers"):
        raise ValueError(f"{path} is a TorchScript file without `layers`, not NVIDIA's inception-2015-12-05.pt.")
    return module.layers


def _load_layers(path: Path) -> nn.Module:
    """torch-fidelity's layers up to the last pooling with the weights of a .pth file; convolutions are fused."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        network = _build_network(state)
    except Exception as error:  # damaged and foreign files raise pickle, zip, key and runtime errors
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} does not hold weights of Inception v3 as torch-fidelity stores them ({reason}); give one of "
            f"{', '.join(KNOWN_WEIGHTS)}."
        ) from error
    module: Any
    for module in network.modules():
        if hasattr(module, "conv") and hasattr(module, "bn"):
            module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    layers = [layer for name, layer in network.named_children() if name != "fc"]
    sequence: Any = nn.Sequential(*layers)  # the annotations of `to` lack memory_format
    return sequence.to(memory_format=torch.channels_last)


def _build_network(state: dict[str, torch.Tensor]) -> nn.Module:
    """torch-fidelity's network, which reads its weights by torch.load: here from memory, after a load without code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    kind = load_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    return kind("inception-v3-compat", [str(WIDTH)], feature_extractor_weights_path=buffer)


def write_random_weights(path: str | Path, seed: int = 0) -> str:
    """Write random weights in the layout of the published .pth files, for tests and for measuring rates.

    Convolutions keep the variance of their input (He et al.). Returns the SHA-256 of the file.
    """
    kind = load_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3

    # Keeps the weights of the constructor, which would load those of a file.
    unloaded = type("Unloaded", (kind,), {"load_state_dict": lambda self, state: None})
    buffer = io.BytesIO()
    torch.save({}, buffer)
    buffer.seek(0)
    network = unloaded("inception-v3-compat", [str(WIDTH)], feature_extractor_weights_path=buffer)
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    for name, value in state.items():
        if value.ndim == 4:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif value.is_floating_point() and name.startswith("fc"):
            state[name] = torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5
    torch.save(state, path)
    return sha256_file(path)
