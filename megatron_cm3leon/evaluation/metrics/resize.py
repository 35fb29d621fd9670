"""The three resizings to the input of the Inception network that published FIDs were computed with.

    clean               Pillow bicubic, each channel in float, antialiased, no rounding, clipped (clean-fid, 2104.11222)
    legacy_pytorch      torch bilinear without antialias, and inputs in [-1, 1]: pytorch-fid, the paper's program
    legacy_tensorflow   bilinear as TensorFlow 1 computed it: the first FID program, torch-fidelity

The names are clean-fid's. With the same network and weights, the mode alone moves an FID by several points.
Legend: n images, H height, W width; values 0..255.
"""

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.evaluation.metrics.fidelity import load_fidelity

MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")


def resize_clean(image_HW3: np.ndarray, size: int) -> np.ndarray:
    """One uint8 image to float32 [3, size, size], values 0..255 that are not rounded."""
    channels = [
        Image.fromarray(image_HW3[:, :, number].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        for number in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels]).clip(0, 255)


def resize_batch(images_n3HW: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """float32 [n, 3, H, W] to [n, 3, size, size] by one of the two legacy modes."""
    if mode == "legacy_pytorch":
        return torch.nn.functional.interpolate(images_n3HW, (size, size), mode="bilinear", align_corners=False)
    resize = load_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    return resize(images_n3HW, size=(size, size), align_corners=False)


def scale_values(images: torch.Tensor, mode: str) -> torch.Tensor:
    """Values 0..255 to the input of the Inception network.

    pytorch-fid maps 255 to 1; TensorFlow's graph, clean-fid and torch-fidelity compute (x - 128) / 128.
    """
    return images / 127.5 - 1 if mode == "legacy_pytorch" else (images - 128) / 128
