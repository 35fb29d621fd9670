"""The device on which a tool computes: its option `--device`."""

import torch

from megatron_cm3leon.distributed.launch import Rank


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


def resolve_rank_device(name: str, rank: Rank) -> str:
    """`resolve_device` for a rank: with several ranks on a node each has its own CUDA device, the current one from now.

    `auto` is the CPU if the node has fewer devices than ranks. ValueError for `cuda` then, and for one device for all.
    """
    ranks, devices = rank.local_world_size, torch.cuda.device_count()
    if ranks == 1:
        return resolve_device(name)
    if name == "auto" and devices < ranks:
        return "cpu"
    if name not in ("auto", "cuda"):
        found = resolve_device(name)
        if torch.device(found).type == "cuda":
            raise ValueError(f"--device ({name}) is one device for {ranks} ranks of a node; use auto, cpu or cuda.")
        return found
    if devices < ranks:
        raise ValueError(
            f"--device (cuda) requires a CUDA device for each of the {ranks} ranks of a node, which has {devices}; "
            f"start fewer ranks or use cpu."
        )
    torch.cuda.set_device(rank.local_rank)
    return f"cuda:{rank.local_rank}"
