"""The device on which a tool computes: its option `--device`."""

import torch


def resolve_device(name: str) -> str:
    """Resolve `auto` to cuda or cpu; ValueError for a device that torch does not know or this machine does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device ({name}) is not a valid torch device; use auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device ({name}) requires a CUDA device that this machine does not have (it has "
            f"{torch.cuda.device_count()}); use auto or cpu."
        )
    return name
